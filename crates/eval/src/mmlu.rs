//! MMLU (Hendrycks et al. 2021): questions with four choices, of which the most probable letter counts.
//!
//! The prompts are those of lm-evaluation-harness 0.4.13, group `mmlu`: the first examples of the subject's `dev` file in
//! their order, and the categories and averages are that group's as well.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use ternion_core::{Error, ErrorKind, Result};
use tokio_util::sync::CancellationToken;

use crate::{
    data::{self, Row},
    likelihood::{joined, loglikelihood},
    model::Model,
    prompt::{FewShot, Shot, python_strip},
    records::{Outcome, Record},
    task::{DataHash, DataId, Item, TaskId, Work},
};

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// The categories of the subjects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// Science, technology, engineering and mathematics.
    Stem,
    /// History, law, philosophy.
    Humanities,
    /// Economics, geography, politics, psychology.
    SocialSciences,
    /// Business, health and the rest.
    Other,
}

const STEM: &str = "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science \
    college_mathematics college_physics computer_security conceptual_physics electrical_engineering \
    elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science \
    high_school_mathematics high_school_physics high_school_statistics machine_learning";
const HUMANITIES: &str = "formal_logic high_school_european_history high_school_us_history \
    high_school_world_history international_law jurisprudence logical_fallacies moral_disputes moral_scenarios \
    philosophy prehistory professional_law world_religions";
const SOCIAL_SCIENCES: &str = "econometrics high_school_geography high_school_government_and_politics \
    high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality \
    professional_psychology public_relations security_studies sociology us_foreign_policy";
const OTHER: &str = "business_ethics clinical_knowledge college_medicine global_facts human_aging management \
    marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology";

impl Category {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Stem, Self::Humanities, Self::SocialSciences, Self::Other];

    /// The category of a subject; `None` for one that MMLU does not have.
    pub fn of(subject: &str) -> Option<Self> {
        let lists = [STEM, HUMANITIES, SOCIAL_SCIENCES, OTHER];
        let found =
            Self::ALL.iter().zip(lists).find(|(_, list)| list.split_whitespace().any(|s| s == subject));
        found.map(|(category, _)| *category)
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stem => "STEM",
            Self::Humanities => "humanities",
            Self::SocialSciences => "social sciences",
            Self::Other => "other",
        }
    }
}

#[derive(Default)]
struct Subject {
    dev: Vec<Row>,
    test: Vec<Row>,
}

/// The items of the data set at `path`, of all subjects or of those that are named.
pub(crate) fn read(
    path: &Path,
    task: &TaskId,
    wanted: &[String],
    limit: Option<usize>,
) -> Result<(Vec<Item>, DataId)> {
    let subjects = load(path)?;
    for name in wanted {
        if subjects.get(name).is_none_or(|s| s.test.is_empty()) {
            let mut known: Vec<_> = subjects.keys().map(String::as_str).collect();
            let more = if known.len() > 8 { ", ..." } else { "" };
            known.truncate(8);
            let message = format!("no subject `{name}`; there are {}{more}", known.join(", "));
            return Err(Error::invalid_request(message).with("path", path.display()));
        }
    }
    let mut hash = DataHash::default();
    let mut items = Vec::new();
    let mut total = 0;
    for (name, subject) in subjects {
        hash.text(&name);
        let dev = subject.dev.iter().map(|row| question(row, &mut hash)).collect::<Result<Vec<_>>>()?;
        let test = subject.test.iter().map(|row| question(row, &mut hash)).collect::<Result<Vec<_>>>()?;
        total += test.len();
        if test.is_empty() || !(wanted.is_empty() || wanted.contains(&name)) {
            continue;
        }
        if dev.len() < task.shots {
            return Err(Error::invalid_request(format!(
                "subject `{name}` has {} questions in `dev`, from which {} examples are taken; give that or fewer shots",
                dev.len(),
                task.shots
            ))
            .with("path", path.display()));
        }
        let shot =
            |(question, answer): (String, usize)| Shot { question, answer: LETTERS[answer].to_owned() };
        let shots: Arc<[Shot]> = dev.into_iter().take(task.shots).map(shot).collect();
        let about = name.replace('_', " ");
        let description =
            format!("The following are multiple choice questions (with answers) about {about}.\n\n");
        for (i, (question, gold)) in test.into_iter().take(limit.unwrap_or(usize::MAX)).enumerate() {
            let prompt = FewShot { description: description.clone(), shots: Arc::clone(&shots), question };
            items.push(Item {
                id: format!("{name}/{i}"),
                group: name.clone(),
                work: Work::Choose { prompt, gold },
            });
        }
    }
    Ok((items, hash.finish(total)))
}

fn question(row: &Row, hash: &mut DataHash) -> Result<(String, usize)> {
    let [a, b, c, d] = row.four_texts("choices")?;
    let answer = row.choice("answer")?;
    let text = python_strip(row.text("question")?);
    let question = format!("{text}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:");
    hash.text(&question);
    hash.text(LETTERS[answer]);
    Ok((question, answer))
}

/// All subjects, from whichever layout the folder has.
fn load(path: &Path) -> Result<BTreeMap<String, Subject>> {
    let mut subjects = BTreeMap::new();
    // CSV files in `dev` and `test`, as the authors distribute them.
    if let Some(root) = [path.to_owned(), path.join("data")].into_iter().find(|p| p.join("test").is_dir()) {
        for file in csv_files(&root, "test")? {
            let Some(name) = subject_of(&file, "test") else { continue };
            let dev = root.join("dev").join(format!("{name}_dev.csv"));
            let dev = if dev.is_file() { data::read_csv(&dev)? } else { Vec::new() };
            subjects.insert(name, Subject { dev, test: data::read_csv(&file)? });
        }
    } else if let Some(folder) =
        [path.to_owned(), path.join("all")].into_iter().find(|p| has_split(p, "test"))
    {
        read_folder(&folder, &mut subjects)?;
    } else if path.is_dir() {
        // A folder for each subject.
        for folder in data::list(path)? {
            if has_split(&folder, "test") {
                read_folder(&folder, &mut subjects)?;
            }
        }
    }
    if subjects.is_empty() {
        let message = "no MMLU there: neither test/SUBJECT_test.csv, nor test-*.parquet, nor a folder of those for each \
                       subject";
        return Err(Error::new(ErrorKind::NotFound, message).with("path", path.display()));
    }
    Ok(subjects)
}

fn csv_files(root: &Path, split: &str) -> Result<Vec<PathBuf>> {
    let mut files = data::list(&root.join(split))?;
    files.retain(|path| data::extension(path) == "csv");
    Ok(files)
}

fn subject_of(file: &Path, split: &str) -> Option<String> {
    let name = file.file_stem()?.to_str()?;
    name.strip_suffix(split)?.strip_suffix('_').map(str::to_owned)
}

fn has_split(folder: &Path, split: &str) -> bool {
    folder.is_dir() && data::split_files(folder, split).is_ok_and(|files| !files.is_empty())
}

/// The rows of a folder with `dev` and `test`; the subject stands in a column or is the folder's name.
fn read_folder(folder: &Path, subjects: &mut BTreeMap<String, Subject>) -> Result<()> {
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    for split in ["dev", "test"] {
        for row in data::read(&data::split_files(folder, split)?)? {
            let subject = if row.fields.contains_key("subject") {
                row.text("subject")?.to_owned()
            } else {
                name.clone()
            };
            let entry = subjects.entry(subject).or_default();
            if split == "dev" { entry.dev.push(row) } else { entry.test.push(row) }
        }
    }
    Ok(())
}

/// Scores the four letters of an item.
pub(crate) async fn choose(
    model: &Model,
    task: &TaskId,
    item: &Item,
    prompt: &FewShot,
    gold: usize,
    cancel: &CancellationToken,
) -> Result<Record> {
    let encoder = model.scoring("mmlu")?;
    let mut shots = prompt.shots.len();
    let pairs = loop {
        let context = prompt.render(shots, &encoder.tokenizer, task.chat)?;
        let space = if task.chat { "" } else { " " };
        let pairs = LETTERS
            .iter()
            .map(|letter| encoder.pair(&context, &format!("{space}{letter}")))
            .collect::<Result<Vec<_>>>()?;
        if shots == 0 || pairs.iter().all(|(c, l)| c.len() + l.len() <= model.context()) {
            break pairs;
        }
        shots -= 1;
    };
    let mut truncated = false;
    let mut loglikelihoods = Vec::new();
    for (context, continuation) in pairs {
        let (tokens, start, cut) = joined(&context, &continuation, model.context())?;
        truncated |= cut;
        loglikelihoods.push(loglikelihood(&*model.backend, tokens, start, 0, cancel).await?.total);
    }
    let mut choice = 0;
    for (i, value) in loglikelihoods.iter().enumerate() {
        // Of equal ones the first.
        if *value > loglikelihoods[choice] {
            choice = i;
        }
    }
    Ok(Record {
        id: item.id.clone(),
        group: item.group.clone(),
        shots,
        truncated,
        outcome: Outcome::Chosen { loglikelihoods, choice, gold },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_57_subjects_are_in_four_categories() {
        let sizes = [STEM, HUMANITIES, SOCIAL_SCIENCES, OTHER].map(|list| list.split_whitespace().count());
        assert_eq!(sizes, [19, 13, 12, 13]);
        assert_eq!(Category::of("virology"), Some(Category::Other));
        assert_eq!(Category::of("college_physics"), Some(Category::Stem));
        assert_eq!(Category::of("physics"), None);
    }

    #[test]
    fn a_subject_is_named_by_its_file() {
        assert_eq!(
            subject_of(Path::new("a/us_foreign_policy_test.csv"), "test").unwrap(),
            "us_foreign_policy"
        );
        assert!(subject_of(Path::new("a/readme.csv"), "test").is_none());
    }
}
