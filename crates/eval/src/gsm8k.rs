//! GSM8K (Cobbe et al. 2021): word problems whose answers end in `#### NUMBER`.
//!
//! The prompts, stop strings, extractions and comparisons are those of lm-evaluation-harness 0.4.13, tasks `gsm8k` and
//! `gsm8k_cot`, both version 3.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use regex::Regex;
use serde::Deserialize;
use ternion_core::{Error, ErrorKind, FinishReason, GenerateRequest, Prompt, Result, Sampling};
use tokio_util::sync::CancellationToken;

use crate::{
    data::{self, Row},
    model::Model,
    prompt::{FewShot, Shot, python_strip},
    python_random::PythonRandom,
    records::{Outcome, Record},
    task::{DataHash, DataId, Item, TaskId, Work},
};

/// The eight examples of Wei et al. (2022), "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models", table
/// 20, as lm-evaluation-harness has them.
const COT: &str = include_str!("../data/gsm8k_cot.jsonl");
/// How many they are.
pub(crate) const COT_SHOTS: usize = 8;
/// What an answer without the form that is looked for counts as.
const INVALID: &str = "[invalid]";

const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];
const COT_STOPS: [&str; 3] = ["Q:", "</s>", "<|im_end|>"];

fn pattern(pattern: &str) -> Regex {
    Regex::new(pattern).expect("invariant: the pattern is written here")
}

static STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (-?[0-9.,]+)"));
static COT_STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"The answer is (-?[0-9.,]+)."));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));

#[derive(Deserialize)]
struct Example {
    question: String,
    target: String,
}

/// The items of the data set at `path`.
pub(crate) fn read(path: &Path, task: &TaskId) -> Result<(Vec<Item>, DataId)> {
    let cot = task.name == crate::task::Kind::Gsm8kCot;
    let (files, train) = locate(path)?;
    let tests = problems(&data::read(&files)?)?;
    let mut hash = DataHash::default();
    for (question, answer) in &tests {
        hash.text(question);
        hash.text(answer);
    }
    let ask = |question: &str| {
        if cot { format!("Q: {question}\nA:") } else { format!("Question: {question}\nAnswer:") }
    };
    let pool: Vec<Shot> = if cot {
        examples()?.into_iter().map(|e| Shot { question: ask(&e.question), answer: e.target }).collect()
    } else if task.shots > 0 {
        let train = problems(&data::read(&train_files(&train)?)?)?;
        train.into_iter().map(|(question, answer)| Shot { question: ask(&question), answer }).collect()
    } else {
        Vec::new()
    };
    for shot in &pool {
        hash.text(&shot.question);
        hash.text(&shot.answer);
    }
    if task.shots > pool.len() {
        return Err(Error::invalid_request(format!(
            "shots: {} is out of range; there are {} examples",
            task.shots,
            pool.len()
        )));
    }
    let mut random = PythonRandom::new(task.seed);
    let fixed: Arc<[Shot]> = pool.iter().take(task.shots).cloned().collect();
    let data = hash.finish(tests.len());
    let items = tests.into_iter().enumerate().map(|(i, (question, answer))| {
        let shots = if cot || task.shots == 0 {
            Arc::clone(&fixed)
        } else {
            let drawn = random.sample(pool.len(), task.shots).unwrap_or_default();
            drawn.into_iter().map(|i| pool[i].clone()).collect()
        };
        let prompt = FewShot { description: String::new(), shots, question: ask(&question) };
        let gold = if cot {
            python_strip(answer.rsplit("####").next().unwrap_or_default()).to_owned()
        } else {
            answer
        };
        let group = task.name.name().to_owned();
        Item { id: format!("{group}/{i}"), group, work: Work::Generate { prompt, gold, cot } }
    });
    Ok((items.collect(), data))
}

/// The files with the questions, and the file or folder from which the examples are drawn.
fn locate(path: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
    if !path.is_dir() {
        // `NAME_train.jsonl` beside `NAME.jsonl`, else what the folder has.
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let own = path.with_file_name(format!("{stem}_train.{}", data::extension(path)));
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        return Ok((vec![path.to_owned()], if own.is_file() { own } else { folder }));
    }
    // As it is, as the hub has it, as the authors' repository has it.
    for folder in [path.to_owned(), path.join("main"), path.join("grade_school_math/data")] {
        if folder.is_dir() {
            let files = data::split_files(&folder, "test")?;
            if !files.is_empty() {
                return Ok((files, folder));
            }
        }
    }
    Err(Error::new(ErrorKind::NotFound, "no test.jsonl and no test-*.parquet in the folder or its `main`")
        .with("path", path.display()))
}

fn train_files(folder: &Path) -> Result<Vec<PathBuf>> {
    if folder.is_file() {
        return Ok(vec![folder.to_owned()]);
    }
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let files = data::split_files(folder, "train")?;
    if files.is_empty() {
        let message = "no train.jsonl and no train-*.parquet, from which the examples are drawn; \
                       0 shots ask without examples";
        return Err(Error::new(ErrorKind::NotFound, message).with("path", folder.display()));
    }
    Ok(files)
}

fn problems(rows: &[Row]) -> Result<Vec<(String, String)>> {
    let problem = |row: &Row| {
        let (question, answer) = (row.text("question")?, row.text("answer")?);
        if !answer.contains("#### ") {
            return Err(row.wrong("the answer has no `#### ` before its result"));
        }
        Ok((question.to_owned(), answer.to_owned()))
    };
    rows.iter().map(problem).collect()
}

fn examples() -> Result<Vec<Example>> {
    let example = |line| {
        serde_json::from_str(line)
            .map_err(|e| Error::invalid_request("the examples are no JSON lines").with_source(e))
    };
    COT.lines().map(example).collect()
}

/// Generates the answer of an item and compares it with the right one.
pub(crate) async fn answer(
    model: &Model,
    task: &TaskId,
    item: &Item,
    (prompt, gold, cot): (&FewShot, &str, bool),
    cancel: &CancellationToken,
) -> Result<Record> {
    let mut stop: Vec<String> = if cot { COT_STOPS } else { STOPS }.map(str::to_owned).into();
    let mut shots = prompt.shots.len();
    let mut truncated = false;
    let request = if let Some(encoder) = &model.encoder {
        // The answer has its place, but never more than half of the context.
        let room = model.context() - task.max_tokens.min(model.context() / 2);
        let mut tokens = encoder.encode(&prompt.render(shots, &encoder.tokenizer, task.chat)?)?;
        while tokens.len() > room && shots > 0 {
            shots -= 1;
            tokens = encoder.encode(&prompt.render(shots, &encoder.tokenizer, task.chat)?)?;
        }
        truncated = tokens.len() > room;
        tokens.drain(..tokens.len().saturating_sub(room));
        // The text of the EOS ends an answer as well.
        let eos = encoder.tokenizer.eos_id().map(|id| encoder.tokenizer.decode(&[id], false)).transpose()?;
        stop.extend(eos.filter(|eos| !eos.is_empty()));
        GenerateRequest::new(tokens)
    } else if task.chat {
        GenerateRequest::new(Prompt::Chat(prompt.messages(shots)))
    } else {
        GenerateRequest::new(prompt.text(shots))
    };
    let request = request
        .with_max_tokens(task.max_tokens)
        .with_stop(stop)
        .with_sampling(Sampling::greedy())
        .with_cancel(cancel.clone());
    let done = model.backend.generate(request).await?.collect().await?;
    if done.finish_reason == FinishReason::Cancelled {
        return Err(Error::cancelled());
    }
    let strict = extract_strict(&done.text, cot);
    let flexible = extract_flexible(&done.text);
    Ok(Record {
        id: item.id.clone(),
        group: item.group.clone(),
        shots,
        truncated,
        outcome: Outcome::Generated {
            strict_match: is_match(&strict, gold),
            flexible_match: is_match(&flexible, gold),
            text: done.text,
            strict,
            flexible,
            gold: result_of(gold),
        },
    })
}

/// The first number in the form that the task asks for.
fn extract_strict(text: &str, cot: bool) -> String {
    let pattern = if cot { &COT_STRICT } else { &STRICT };
    pattern.captures(text).map_or(INVALID.to_owned(), |found| python_strip(&found[1]).to_owned())
}

/// The last number in any form.
fn extract_flexible(text: &str) -> String {
    FLEXIBLE
        .find_iter(text)
        .last()
        .map_or(INVALID.to_owned(), |found| python_strip(found.as_str()).to_owned())
}

/// Whether the two are the same but for letters' case, commas, dollar signs, a working before `#### ` and a full stop at
/// the end.
fn is_match(answer: &str, gold: &str) -> bool {
    result_of(answer).to_lowercase() == result_of(gold).to_lowercase()
}

fn result_of(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let result = text.rsplit("#### ").next().unwrap_or_default();
    // Python's `\.$` also matches before a line's end.
    match result.strip_suffix(".\n") {
        Some(before) => format!("{before}\n"),
        None => result.strip_suffix('.').unwrap_or(result).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_takes_the_first_marked_number_and_flexible_the_last_of_all() {
        let text = "5 + 7 = $12.\n#### 12\n#### 13, or -4";
        assert_eq!(extract_strict(text, false), "12");
        assert_eq!(extract_flexible(text), "-4");
        assert_eq!(extract_flexible("it costs $1,335."), "$1,335.");
        assert_eq!(extract_flexible("none"), INVALID);
        assert_eq!(extract_strict("####12", false), INVALID);
        assert_eq!(extract_strict("The answer is 8.", true), "8");
        assert_eq!(extract_strict("The answer is 8. The answer is 9.", true), "8.");
        assert_eq!(extract_strict("The answer is 8", true), INVALID);
    }

    #[test]
    fn what_is_compared_has_no_commas_dollars_workings_and_last_stop() {
        assert!(is_match("$1,335.", "a line\n#### 1,335"));
        assert!(is_match("1335", "x #### 7 #### 1,335"));
        assert!(!is_match("12.0", "#### 12"));
        assert!(!is_match(INVALID, "#### 12"));
        assert!(!is_match("12", "#### 12\n"), "a line's end counts");
        assert_eq!(result_of("#### 12.\n"), "12\n");
    }

    #[test]
    fn the_examples_are_eight() {
        let examples = examples().unwrap();
        assert_eq!(examples.len(), COT_SHOTS);
        assert!(examples.iter().all(|e| extract_strict(&e.target, true) != INVALID));
    }
}
