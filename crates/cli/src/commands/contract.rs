//! The contract of the trait, tried on one model: what `ternion conformance` does where there is nothing to compare with.

use serde::Serialize;
use ternion_conformance::{Outcome as Tried, all};

use super::load;
use crate::App;
use crate::failure::{Failure, Outcome};
use crate::model::Selected;

/// The checks fill the context and the queue, which takes long where these are large.
const CONTEXT: usize = 256;
const QUEUED: usize = 8;

#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    outcome: &'static str,
    sentence: String,
    /// What was found and expected, or why the check does not apply.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

pub(crate) async fn run(app: &App, mut selected: Selected) -> Outcome {
    let model = selected.model_mut()?;
    model.context_length = Some(model.context_length.unwrap_or(CONTEXT).min(CONTEXT));
    model.max_queued = Some(model.max_queued.unwrap_or(QUEUED).min(QUEUED));
    let backend = load(app, &selected).await?;
    let info = backend.info();
    app.output.notice(&format!("trying {} ({} on {})", info.name, info.format, info.backend));

    let interrupted = app.interrupts.renew();
    let mut lines = Vec::new();
    for check in all() {
        let tried = tokio::select! {
            tried = check.outcome(&*backend) => tried,
            () = interrupted.cancelled() => return Err(Failure::Interrupted),
        };
        let (outcome, detail) = match tried {
            Tried::Passed => ("pass", None),
            Tried::Skipped(why) => ("skip", Some(why)),
            Tried::Failed(failure) => {
                ("FAIL", Some(format!("found {}; {} expected", failure.found, failure.expected)))
            }
        };
        if !app.output.json {
            app.output.line(&format!("{outcome}  {}", check.name))?;
            if let Some(detail) = &detail {
                app.output.line(&format!("      {detail}"))?;
            }
            if outcome == "FAIL" {
                app.output.line(&format!("      {}", check.sentence))?;
            }
        }
        lines.push(Line { name: check.name, outcome, sentence: check.sentence.to_string(), detail });
    }
    app.interrupts.idle();

    let count = |outcome: &str| lines.iter().filter(|line| line.outcome == outcome).count();
    let (passed, failed, skipped) = (count("pass"), count("FAIL"), count("skip"));
    if app.output.json {
        app.output.object(&serde_json::json!({
            "model": &*info, "passed": failed == 0, "checks": lines,
        }))?;
    } else {
        app.output.line(&format!("{passed} passed, {failed} failed, {skipped} do not apply"))?;
    }
    if failed == 0 { Ok(()) } else { Err(Failure::Beyond) }
}
