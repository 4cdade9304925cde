//! Long inputs of `chat` and `generate`: the document, the policy, and what is told of what was done.

use ternion::GenerateRequest;
use ternion::context::{ContextPolicy, ContextReport, ContextStep};

use super::chunk::kind_of;
use crate::App;
use crate::args::LongArgs;
use crate::failure::{Failure, Outcome};
use crate::input::TextSource;
use crate::model::Selected;
use crate::output::Bar;

/// Reads the document and puts it and the policy into the request. Where `--policy` names the policy of the configuration,
/// the configuration's options of it stay, except for what `--policy` says itself.
pub(crate) fn apply(selected: &Selected, args: &LongArgs, request: &mut GenerateRequest) -> Outcome {
    if let Some(file) = &args.file {
        request.params.document = Some(TextSource::new(None, Some(file)).read("document")?);
    }
    let configured = &selected.model()?.context_policy;
    let mut policy = match &args.policy {
        Some(asked) => asked.over(configured),
        None => configured.clone(),
    };
    match &mut policy {
        ContextPolicy::MapReduce(chunked) | ContextPolicy::Refine(chunked) => {
            chunked.chunk_tokens = args.chunk_tokens.or(chunked.chunk_tokens);
            chunked.overlap = args.overlap.or(chunked.overlap);
            if let Some(kind) = args.kind.or(args.file.as_deref().map(kind_of)) {
                chunked.chunk_kind = kind;
            }
        }
        _ => {
            let flags = [
                ("--chunk-tokens", args.chunk_tokens.is_some()),
                ("--overlap", args.overlap.is_some()),
                ("--kind", args.kind.is_some()),
            ];
            if let Some((flag, _)) = flags.iter().find(|(_, given)| *given) {
                return Err(Failure::usage(format!("{flag} goes with --policy map-reduce or refine")));
            }
        }
    }
    if policy != *configured {
        request.params.context_policy = Some(policy);
    }
    Ok(())
}

/// Shows a step.
pub(crate) fn show(app: &App, bar: &Bar, step: &ContextStep) {
    match step {
        ContextStep::PartDone { round, part, parts, .. } => {
            bar.stage(if *round == 0 { "parts" } else { "merge" });
            bar.set(*part as u64 + 1, *parts as u64);
            let what = if *round == 0 { "part".to_owned() } else { format!("round {round}: group") };
            app.output.progress(&format!("{what} {} of {parts} is done", part + 1));
        }
        ContextStep::WindowMoved { dropped, kept } => {
            app.output.progress(&format!("the window has moved: {dropped} tokens dropped, {kept} kept"));
        }
        _ => {}
    }
}

/// The report in a few lines.
pub(crate) fn lines(report: &ContextReport) -> Vec<String> {
    let mut lines = vec![format!(
        "{}: prompt of {} tokens, at most {} fit; {}, {} prompt tokens ({} cached), {} generated",
        report.policy,
        report.prompt_tokens,
        report.prompt_limit,
        counted(report.calls, "request"),
        report.total_prompt_tokens,
        report.total_cached_tokens,
        report.total_completion_tokens
    )];
    if !report.chunks.is_empty() {
        let largest = report.chunks.iter().map(|c| c.tokens).max().unwrap_or(0);
        let merged: Vec<String> = report.merged.iter().map(ToString::to_string).collect();
        let mut line = format!("{} of at most {largest} tokens", counted(report.chunks.len(), "chunk"));
        if !merged.is_empty() {
            line += &format!(", answers merged: {}", merged.join(", then "));
        }
        if report.answers_cut > 0 {
            line += &format!("; {} cut to fit", counted(report.answers_cut, "answer"));
        }
        lines.push(line);
    }
    if report.window_moves > 0 {
        lines.push(format!(
            "the window moved {} times: {} tokens left it, {} were computed again",
            report.window_moves, report.window_dropped_tokens, report.recomputed_tokens
        ));
    }
    for dropped in &report.dropped {
        let place = dropped.message.map_or_else(String::new, |i| format!(" of message {i}"));
        lines.push(format!(
            "dropped: {}..{}{place}, {}",
            dropped.start,
            dropped.end,
            counted(dropped.tokens, "token")
        ));
    }
    lines
}

fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

#[cfg(test)]
mod tests {
    use ternion::context::ContextPolicy;

    use crate::args::PolicyArg;

    #[test]
    fn the_flag_wins_over_the_configuration() {
        let configured: ContextPolicy = serde_json::from_value(serde_json::json!({
            "kind": "truncate", "drop": "middle", "reserve": 100,
        }))
        .unwrap();
        for (flag, expected) in [
            ("truncate", serde_json::json!({"kind": "truncate", "drop": "middle", "reserve": 100})),
            (
                "truncate-oldest-turns",
                serde_json::json!({"kind": "truncate", "drop": "oldest_turns", "reserve": 100}),
            ),
            ("truncate_tail", serde_json::json!({"kind": "truncate", "drop": "tail", "reserve": 100})),
            ("reject", serde_json::json!({"kind": "reject"})),
        ] {
            let found = flag.parse::<PolicyArg>().unwrap().over(&configured);
            assert_eq!(found, serde_json::from_value(expected).unwrap(), "{flag}");
        }
        let head = "truncate-head".parse::<PolicyArg>().unwrap().over(&ContextPolicy::Reject);
        assert_eq!(head, "truncate-head".parse().unwrap());
    }
}
