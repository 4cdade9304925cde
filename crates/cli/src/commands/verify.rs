//! `ternion verify`: is this the model that it should be, and does this build compute with it what it should?

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};
use ternion::{Error, GenerateRequest, LlmBackend, LogitsRequest, Sampling, ScoreRequest};

use super::expectation::{Expectation, ExpectedLogits, ExpectedText};
use super::{blocking, load};
use crate::App;
use crate::args::VerifyArgs;
use crate::failure::{Failure, Outcome};
use crate::model::{Selected, folder_of};

/// One comparison.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    /// `None`: there is nothing to compare with.
    passed: Option<bool>,
    detail: String,
}

impl Check {
    fn new(name: impl Into<String>, passed: impl Into<Option<bool>>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), passed: passed.into(), detail: detail.into() }
    }
}

/// Collects the checks and, without `--json`, prints each as it comes.
struct Checks<'a> {
    app: &'a App,
    done: Vec<Check>,
}

impl Checks<'_> {
    fn push(&mut self, check: Check) -> Outcome {
        if !self.app.output.json {
            let verdict = match check.passed {
                Some(true) => "pass",
                Some(false) => "FAIL",
                None => "    ",
            };
            self.app.output.line(&format!("{verdict}  {:24}  {}", check.name, check.detail))?;
        }
        self.done.push(check);
        Ok(())
    }

    fn passed(&self) -> bool {
        self.done.iter().all(|check| check.passed != Some(false))
    }
}

pub(crate) async fn run(app: &App, args: &VerifyArgs) -> Outcome {
    let expected = Expectation::load(args.expect.as_deref())?;
    let selected = Selected::for_engine(app, &args.engine)?;
    let path = selected.path()?;
    app.output.notice(&format!("{} is compared with {}", path.display(), expected.model));

    let mut checks = Checks { app, done: Vec::new() };
    for check in blocking(app, || files(app, path, &expected.files))? {
        checks.push(check)?;
    }
    let backend = load(app, &selected).await?;
    let vocab_size = backend.info().limits.vocab_size;
    let same_vocabulary = vocab_size == expected.vocab_size;
    let detail = format!("{vocab_size} entries, expected {}", expected.vocab_size);
    checks.push(Check::new("vocabulary", same_vocabulary, detail))?;
    // With another vocabulary the token ids mean nothing.
    if same_vocabulary {
        if let Some(logits) = &expected.logits {
            verify_logits(&mut checks, &*backend, logits).await?;
        }
        if let Some(generation) = &expected.generation {
            verify_text(&mut checks, &*backend, generation).await?;
        }
    }

    let passed = checks.passed();
    if app.output.json {
        app.output.object(&serde_json::json!({
            "model": selected.name,
            "expected": expected.model,
            "source": expected.source,
            "passed": passed,
            "checks": checks.done,
        }))?;
    } else {
        let failed = checks.done.iter().filter(|check| check.passed == Some(false)).count();
        app.output.line(&match failed {
            0 => "all checks passed".to_owned(),
            n => {
                format!("{n} of {} checks failed", checks.done.iter().filter(|c| c.passed.is_some()).count())
            }
        })?;
    }
    if passed { Ok(()) } else { Err(Failure::Mismatch) }
}

/// The hashes of a checkpoint's files, and of those that are expected.
fn files(app: &App, path: &Path, expected: &BTreeMap<String, String>) -> Outcome<Vec<Check>> {
    if path.is_file() && ternion::formats::gguf_file(path)?.is_some() {
        // One file is the whole checkpoint, and the hashes of another form's files say nothing of it.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let found = sha256(app, path)?;
        return Ok(vec![match expected.get(&name) {
            Some(hash) => Check::new(
                name,
                hash.eq_ignore_ascii_case(&found),
                format!("sha256 {found}, expected {hash}"),
            ),
            None => Check::new(name, None, format!("sha256 {found}")),
        }]);
    }
    let folder = folder_of(path);
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let is_checkpoint = |name: &str| {
        let extension = Path::new(name).extension().and_then(|e| e.to_str());
        matches!(extension, Some("json" | "safetensors" | "jinja"))
    };
    let mut names: BTreeSet<String> = expected.keys().cloned().collect();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        if let Ok(name) = entry.file_name().into_string()
            && is_checkpoint(&name)
            && entry.path().is_file()
        {
            names.insert(name);
        }
    }
    names
        .into_iter()
        .map(|name| {
            let path = folder.join(&name);
            let expected = expected.get(&name);
            if !path.is_file() {
                return Ok(Check::new(name, false, "is missing"));
            }
            let found = sha256(app, &path)?;
            Ok(match expected {
                None => Check::new(name, None, format!("sha256 {found}")),
                Some(hash) if hash.eq_ignore_ascii_case(&found) => {
                    Check::new(name, true, format!("sha256 {found}"))
                }
                Some(hash) => Check::new(
                    name,
                    false,
                    format!(
                        "sha256 {found}, expected {hash}: another revision of the file, or a damaged one"
                    ),
                ),
            })
        })
        .collect()
}

fn sha256(app: &App, path: &Path) -> Outcome<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let total = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let bar = app.output.bytes("hash");
    let (mut hash, mut done) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(|e| Error::io(path, e))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        done += n as u64;
        bar.set(done, total);
    }
    bar.clear();
    Ok(hash.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")))
}

async fn verify_logits(
    checks: &mut Checks<'_>,
    backend: &dyn LlmBackend,
    expected: &ExpectedLogits,
) -> Outcome {
    if let (Some(text), Some(tokenizer)) = (&expected.text, backend.tokenizer()) {
        checks.push(same_ids("tokens of a text", &tokenizer.encode(text, true)?, &expected.input_ids))?;
    }
    let mut request = LogitsRequest::new(expected.input_ids.clone());
    request.cancel = checks.app.interrupts.renew();
    let logits = backend.logits(request).await?;
    let rows = logits.chunks_exact(logits.len() / expected.input_ids.len());
    let means: Vec<f64> =
        rows.map(|row| row.iter().map(|&v| f64::from(v)).sum::<f64>() / row.len() as f64).collect();
    checks.push(close("mean logits", &means, &expected.mean, expected.mean_tolerance))?;
    let first: Vec<f64> = logits.iter().take(expected.first.len()).map(|&v| f64::from(v)).collect();
    checks.push(close("logits at position 0", &first, &expected.first, expected.first_tolerance))
}

async fn verify_text(checks: &mut Checks<'_>, backend: &dyn LlmBackend, expected: &ExpectedText) -> Outcome {
    if let Some(tokenizer) = backend.tokenizer() {
        let ids = tokenizer.encode_chat(&expected.messages, true)?;
        checks.push(same_ids("tokens of a conversation", &ids, &expected.prompt_ids))?;
    }
    let request = GenerateRequest::new(expected.prompt_ids.clone())
        .with_max_tokens(expected.tokens.len())
        .with_sampling(Sampling::greedy())
        .with_cancel(checks.app.interrupts.renew());
    let answer = backend.generate(request).await?.collect().await?;
    if checks.app.interrupts.is_cancelled() {
        return Err(Failure::Interrupted);
    }
    if answer.text == expected.text {
        return checks.push(Check::new("greedy text", true, format!("{:?}", answer.text)));
    }
    let start = expected.prompt_ids.len();
    let mut request =
        ScoreRequest::new([&expected.prompt_ids[..], &expected.tokens].concat(), start).with_top(1);
    request.cancel = checks.app.interrupts.renew();
    let score = backend.score(request).await?;
    let worst = score
        .tokens
        .iter()
        .map(|token| token.top.first().map_or(f32::INFINITY, |best| best.logprob - token.logprob))
        .fold(0.0, f32::max);
    let passed = f64::from(worst) <= expected.logprob_tolerance;
    let detail = format!(
        "{:?}, expected {:?}; the expected tokens are within {worst:.3} of the best, allowed {}",
        answer.text, expected.text, expected.logprob_tolerance
    );
    checks.push(Check::new("greedy text", passed, detail))
}

fn same_ids(name: &str, found: &[u32], expected: &[u32]) -> Check {
    if found == expected {
        return Check::new(name, true, format!("{} token ids", found.len()));
    }
    Check::new(name, false, format!("{found:?}, expected {expected:?}"))
}

/// Whether all values are within `tolerance + tolerance * |expected|`; NaN never is.
fn close(name: &str, found: &[f64], expected: &[f64], tolerance: f64) -> Check {
    let excess = |(f, e): (&f64, &f64)| (f - e).abs() / (tolerance + tolerance * e.abs());
    let worst =
        found.iter().zip(expected).map(|pair| (pair, excess(pair))).max_by(|a, b| a.1.total_cmp(&b.1));
    let Some(((f, e), excess)) = worst else {
        return Check::new(name, found.len() == expected.len(), "no values");
    };
    let passed = found.len() == expected.len() && excess <= 1.0;
    let difference = (f - e).abs();
    let detail = format!(
        "{} values; the worst is {f:.4}, expected {e:.4}: off by {difference:.1e}, allowed {:.1e}",
        found.len(),
        tolerance + tolerance * e.abs()
    );
    Check::new(name, passed, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closeness_is_absolute_plus_relative() {
        assert_eq!(close("x", &[1.0, -9.9], &[1.0, -10.0], 0.01).passed, Some(true));
        assert_eq!(close("x", &[1.0, -9.8], &[1.0, -10.0], 0.01).passed, Some(false));
        assert_eq!(close("x", &[f64::NAN], &[1.0], 0.01).passed, Some(false));
        assert_eq!(close("x", &[1.0], &[1.0, 1.0], 0.01).passed, Some(false));
        assert_eq!(close("x", &[], &[], 0.01).passed, Some(true));
    }
}
