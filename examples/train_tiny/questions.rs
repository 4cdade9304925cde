//! Held-out questions in the files of GSM8K and MMLU, for `ternion eval` and other programs.

use std::collections::HashSet;
use std::error::Error;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::text::{Random, Split, arithmetic, facts};

/// Word problems to answer, and those that may be shown before one.
const PROBLEMS: (usize, usize) = (200, 20);
/// The same of each subject.
const CHOICES: (usize, usize) = (60, 5);

/// Writes `gsm8k.jsonl`, `gsm8k_train.jsonl` and the folders `mmlu/dev` and `mmlu/test` to `folder`.
pub(crate) fn write(folder: &Path) -> Result<(), Box<dyn Error>> {
    for part in ["mmlu/dev", "mmlu/test"] {
        fs::create_dir_all(folder.join(part))?;
    }
    let mut random = Random::new(0, 1 << 41);
    for (name, split, count) in
        [("gsm8k.jsonl", Split::HeldOut, PROBLEMS.0), ("gsm8k_train.jsonl", Split::Train, PROBLEMS.1)]
    {
        let problems = distinct(count, || {
            let problem = arithmetic::problem(&mut random, split);
            (problem.key.clone(), problem)
        });
        let lines =
            problems.iter().map(|p| json!({"question": p.question, "answer": p.answer}).to_string() + "\n");
        fs::write(folder.join(name), lines.collect::<String>())?;
    }
    for subject in facts::SUBJECTS {
        for (part, split, count) in [("test", Split::HeldOut, CHOICES.0), ("dev", Split::Train, CHOICES.1)] {
            let choices = distinct(count, || {
                let choice = facts::choice(&mut random, split, Some(subject));
                (choice.key(), choice)
            });
            // Neither commas nor quotes, so no field needs quotes of its own.
            let lines =
                choices.iter().map(|c| format!("{},{},{}\n", c.question, c.choices.join(","), c.letter()));
            let file = folder.join("mmlu").join(part).join(format!("{subject}_{part}.csv"));
            fs::write(file, lines.collect::<String>())?;
        }
    }
    Ok(())
}

/// So many items that do not ask the same.
fn distinct<T>(count: usize, next: impl FnMut() -> (String, T)) -> Vec<T> {
    let mut seen = HashSet::new();
    std::iter::repeat_with(next)
        .filter(|(key, _)| seen.insert(key.clone()))
        .map(|(_, item)| item)
        .take(count)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_the_columns_and_the_counts() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let problems = read("gsm8k.jsonl");
        assert_eq!(problems.lines().count(), PROBLEMS.0);
        for line in problems.lines() {
            let item: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(item["question"].is_string() && item["answer"].as_str().unwrap().contains("\n#### "));
        }
        for subject in facts::SUBJECTS {
            for (part, count) in [("test", CHOICES.0), ("dev", CHOICES.1)] {
                let file = read(&format!("mmlu/{part}/{subject}_{part}.csv"));
                assert_eq!(file.lines().count(), count);
                for line in file.lines() {
                    let fields: Vec<&str> = line.split(',').collect();
                    assert_eq!(fields.len(), 6, "{line}");
                    assert!(["A", "B", "C", "D"].contains(&fields[5]) && !line.contains('"'), "{line}");
                }
            }
        }
    }
}
