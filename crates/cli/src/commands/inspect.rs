//! `ternion inspect`: what a checkpoint is and what it takes, before one runs it.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ternion::config::ModelConfig;
use ternion::engine::kv::KvType;
use ternion::formats::{
    Checkpoint, ModelSpec, RawCheckpoint, Recognised, Report, RopeScaling, ScaleUse, gguf_file,
};
use ternion::{ErrorKind, MemoryPlan};
use ternion_kernels::ActivationType;

use super::backends::Backends;
use super::{blocking, overview, safetensors};
use crate::App;
use crate::args::InspectArgs;
use crate::failure::Outcome;
use crate::model::Selected;
use crate::output::bytes;

pub(crate) fn run(app: &App, args: &InspectArgs) -> Outcome {
    let selected = Selected::for_engine(app, &args.engine)?;
    let path = selected.path()?;
    // Before the checkpoint is opened, whose pages would count as memory that is taken already.
    let backends = blocking(app, || Backends::of(&selected))?;
    let plan = blocking(app, || ternion::plan(&selected.config, Some(&selected.name)));
    if let Err(error) = &plan
        && error.kind() == ErrorKind::ResourceExhausted
    {
        return plan.map(drop).map_err(Into::into);
    }
    let bar = app.output.bytes("read");
    let facts = selected.facts()?;
    // Weights that would be decoded are not decoded only to be shown.
    if facts.recognise(path).is_ok_and(|how| how == Recognised::Decoded)
        && let Some(file) = gguf_file(path)?
    {
        return overview::show(app, &file, None, &backends, args.tensors);
    }
    let checkpoint = blocking(app, || facts.open(path, &mut |done, total| bar.set(done, total)));
    bar.clear();
    let checkpoint = match checkpoint {
        // Any GGUF file and any safetensors can be shown, whoever runs it.
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound) => {
            if let Some(file) = gguf_file(path)? {
                return overview::show(app, &file, Some(&error), &backends, args.tensors);
            }
            return match RawCheckpoint::open(path) {
                Ok(checkpoint) => safetensors::show(app, &checkpoint, &error, &backends, args.tensors),
                Err(_) => Err(error.into()),
            };
        }
        result => result?,
    };
    let report = checkpoint.report();
    let (tokenizer, of_tokenizer) = tokenizer(&checkpoint, selected.model()?);
    let warnings: Vec<String> = checkpoint.warnings.iter().cloned().chain(of_tokenizer).collect();
    let kv_type = checkpoint.kv_type(named(selected.model()?, "kv_type"));
    let activations = named::<ActivationType>(selected.model()?, "activations");
    if app.output.json {
        let mut facts = as_json(
            &checkpoint,
            &report,
            (kv_type, activations),
            args.tensors,
            &tokenizer,
            &warnings,
            plan.ok().as_ref(),
        );
        facts["backends"] = backends.json();
        return app.output.object(&facts);
    }
    app.output.line(
        as_text(&checkpoint, &report, (kv_type, activations), args.tensors, &tokenizer, &backends).trim_end(),
    )?;
    app.output.line(&match plan {
        Ok(plan) => format!("\n{}", memory_table(&plan)),
        Err(error) => format!("\nmemory       no plan: {error}"),
    })?;
    for warning in warnings {
        app.output.notice(&format!("warning: {warning}"));
    }
    Ok(())
}

/// An option of the configuration. What only another engine knows counts as the default.
fn named<T: Default + DeserializeOwned>(model: &ModelConfig, option: &str) -> T {
    let named = model.options.get(option).cloned();
    named.and_then(|name| serde_json::from_value(name).ok()).unwrap_or_default()
}

/// How thoughts and calls of tools are told from an answer's text.
fn answer_format(answers: &serde_json::Map<String, Value>) -> String {
    let thoughts = match (&answers["reasoning"]["start"], &answers["reasoning"]["end"]) {
        (Value::String(start), Value::String(end)) => format!("thoughts between {start} and {end}"),
        _ => "no thoughts".to_owned(),
    };
    let tools = match (answers["tools"].as_str(), answers["describes_tools"] == true) {
        (None | Some("none"), _) => "calls of tools stay text".to_owned(),
        (Some(form), false) => format!("calls of tools as {form}"),
        (Some(form), true) => {
            format!("calls of tools as {form}, described in the system message for lack of a template")
        }
    };
    format!("{thoughts}; {tools}")
}

/// What is known of the tokenizer, and what is wrong with it.
fn tokenizer(checkpoint: &Checkpoint, config: &ModelConfig) -> (Value, Vec<String>) {
    match checkpoint.tokenizer() {
        Ok(mut tokenizer) => {
            tokenizer.configure_answers(config.tool_format, config.reasoning.as_ref());
            let mut warnings = tokenizer.warnings().to_vec();
            if !tokenizer.has_chat_template() {
                warnings.push("there is no chat template: `chat` will not work, `generate` will".to_owned());
            }
            if tokenizer.eos_id().is_none() && checkpoint.spec.eos.is_empty() {
                warnings.push("no token ends an answer: each goes on to max_tokens".to_owned());
            }
            let (before, after) = tokenizer.added_around();
            let facts = json!({
                "adds_before": before,
                "adds_after": after,
                "vocab_size": tokenizer.vocab_size(),
                "bos": tokenizer.bos_id(),
                "eos": tokenizer.eos_id(),
                "chat_template": tokenizer.has_chat_template(),
                "answers": tokenizer.answer_format(),
            });
            (facts, warnings)
        }
        Err(error) => (Value::Null, vec![format!("the tokenizer cannot be used: {error}")]),
    }
}

/// Sums over the tensors of one kind and element type.
#[derive(Default)]
struct Group {
    tensors: usize,
    parameters: u64,
    mapped: u64,
    owned: u64,
}

fn groups(report: &Report) -> BTreeMap<(&'static str, &'static str), Group> {
    let mut groups: BTreeMap<_, Group> = BTreeMap::new();
    for tensor in &report.tensors {
        let group = groups.entry((tensor.kind, tensor.dtype)).or_default();
        group.tensors += 1;
        group.parameters += tensor.parameters();
        *(if tensor.mapped { &mut group.mapped } else { &mut group.owned }) += tensor.bytes;
    }
    groups
}

fn as_text(
    checkpoint: &Checkpoint,
    report: &Report,
    (kv_type, activations): (KvType, ActivationType),
    all: bool,
    tokenizer: &Value,
    backends: &Backends,
) -> String {
    let spec = &checkpoint.spec;
    let mut text = String::new();
    let mut row = |key: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{key:12} {value}");
    };
    row("model", report.name.clone());
    row("family", format!("{} ({})", report.family, report.architecture));
    row("format", report.format.clone());
    row(
        "parameters",
        format!("{}, {} of them ternary", millions(report.parameters), millions(report.ternary_parameters)),
    );
    row(
        "sizes",
        format!(
            "{} layers, hidden {}, feed-forward {}, {} heads of {} ({} for keys and values), vocabulary {}",
            spec.layers,
            spec.hidden_size,
            spec.intermediate_size,
            spec.heads,
            spec.head_dim,
            spec.kv_heads,
            spec.vocab_size
        ),
    );
    row("context", format!("{} tokens", spec.context_length));
    let norms = match (spec.sub_norms, spec.qk_norm) {
        (true, _) => ", with sub-norms",
        (false, true) => ", with norms of the heads of queries and keys",
        _ => "",
    };
    row("activation", format!("{}{norms}", spec.activation));
    row("rope", format!("theta {}{}", spec.rope.theta, rope_scaling(spec)));
    row("head", if checkpoint.head.is_some() { "its own".into() } else { "the embedding".into() });
    row("ternary", groups_of(report, activations).unwrap_or_else(|| quantization(spec)));
    row("ends with", format!("{:?}", spec.eos));
    let s = &checkpoint.sampling;
    row(
        "sampling",
        if s.temperature == 0.0 {
            "greedy".into()
        } else {
            // A top-p of next to nothing keeps one token, as 0 does.
            let top_p = if s.top_p < 1e-6 { 0.0 } else { s.top_p };
            format!("temperature {}, top-k {}, top-p {top_p}", s.temperature, s.top_k)
        },
    );
    row(
        "tokenizer",
        match tokenizer.get("vocab_size") {
            Some(n) => {
                let template = if tokenizer["chat_template"] == true { "with a" } else { "no" };
                format!("{n} entries, {template} chat template; adds {} a text", around(tokenizer))
            }
            None => "none that can be used".into(),
        },
    );
    if let Some(answers) = tokenizer.get("answers").and_then(Value::as_object) {
        row("answers", answer_format(answers));
    }
    row(
        "weights",
        format!("{} mapped from files, {} in memory", bytes(report.mapped_bytes), bytes(report.owned_bytes)),
    );
    let of = |kv_type| spec.kv_layout().bytes_per_position(kv_type);
    row(
        "KV cache",
        format!(
            "{} a token in {}, {} for a sequence of {} tokens (a token in f32 {}, f16 {}, int8 {})",
            bytes(of(kv_type)),
            kv_type,
            bytes(spec.kv_layout().bytes(kv_type, spec.context_length)),
            spec.context_length,
            bytes(of(KvType::F32)),
            bytes(of(KvType::F16)),
            bytes(of(KvType::Int8)),
        ),
    );
    for (key, value) in backends.rows(None) {
        row(&key, value);
    }
    for assumption in &checkpoint.assumptions {
        row("assumed", assumption.clone());
    }
    text.push('\n');
    if all {
        list(&mut text, report);
    } else {
        for ((kind, dtype), group) in groups(report) {
            let _ = writeln!(
                text,
                "{:>5} {kind:8} {dtype:6} {:>10} parameters, {:>10} mapped, {:>10} in memory",
                group.tensors,
                millions(group.parameters),
                bytes(group.mapped),
                bytes(group.owned)
            );
        }
    }
    text
}

/// The parts of a plan, and what they are for.
pub(super) fn memory_table(plan: &MemoryPlan) -> String {
    let mut text = format!("{:20} {:>10}\n", "memory, at most", bytes(plan.total()));
    for part in &plan.parts {
        let _ = writeln!(text, "  {:18} {:>10}", part.name, bytes(part.bytes));
    }
    let _ = write!(text, "for {plan}");
    for choice in &plan.choices {
        let _ = write!(text, "\nchosen: {choice}");
    }
    text
}

fn list(text: &mut String, report: &Report) {
    let width = report.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
    for t in &report.tensors {
        let shape = format!("{:?}", t.shape);
        let scale = t.scale.map(|s| format!("  scale {s}")).unwrap_or_default();
        let place = if t.mapped { "mapped" } else { "memory" };
        let _ = writeln!(
            text,
            "{:width$}  {:8} {:6} {shape:16} {:>10} {place}{scale}",
            t.name,
            t.kind,
            t.dtype,
            bytes(t.bytes)
        );
    }
}

fn as_json(
    checkpoint: &Checkpoint,
    report: &Report,
    (kv_type, activations): (KvType, ActivationType),
    all: bool,
    tokenizer: &Value,
    warnings: &[String],
    plan: Option<&MemoryPlan>,
) -> Value {
    let spec = &checkpoint.spec;
    let groups: Vec<Value> = groups(report)
        .into_iter()
        .map(|((kind, dtype), g)| {
            json!({"kind": kind, "dtype": dtype, "tensors": g.tensors, "parameters": g.parameters,
                   "mapped_bytes": g.mapped, "owned_bytes": g.owned})
        })
        .collect();
    let files: Vec<_> = checkpoint.files.iter().map(|f| f.to_string_lossy()).collect();
    json!({
        "name": report.name,
        "architecture": report.architecture,
        "family": report.family,
        "format": report.format,
        "files": files,
        "parameters": report.parameters,
        "ternary_parameters": report.ternary_parameters,
        "layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context_length": spec.context_length,
        "activation": spec.activation.to_string(),
        "sub_norms": spec.sub_norms,
        "qk_norm": spec.qk_norm,
        "activations": groups_of(report, activations).map(|_| activations),
        "rms_eps": spec.rms_eps,
        "rope_theta": spec.rope.theta,
        "rope_scaling": rope_scaling(spec).trim_start_matches(", "),
        "tied": checkpoint.head.is_none(),
        "scale": spec.quantization.as_ref().map(|q| match q.scale_use {
            ScaleUse::Multiplies => "multiplies",
            ScaleUse::Divides => "divides",
        }),
        "quantized_at_load": spec.quantization.as_ref().is_some_and(|q| q.online),
        "eos": spec.eos,
        "sampling": checkpoint.sampling,
        "tokenizer": tokenizer,
        "memory": {
            "mapped_bytes": report.mapped_bytes,
            "owned_bytes": report.owned_bytes,
            "kv_type": kv_type,
            "kv_bytes_per_token": spec.kv_layout().bytes_per_position(kv_type),
            "kv_bytes_per_sequence": spec.kv_layout().bytes(kv_type, spec.context_length),
            "plan": plan,
            "planned_bytes": plan.map(MemoryPlan::total),
        },
        "groups": groups,
        "tensors": all.then_some(&report.tensors),
        "assumptions": checkpoint.assumptions,
        "warnings": warnings,
    })
}

/// The ids that a tokenizer adds around a text, and where.
fn around(tokenizer: &Value) -> String {
    let ids = |key: &str, place: &str| {
        let list = tokenizer[key].as_array().filter(|list| !list.is_empty())?;
        Some(format!("{} {place}", list.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")))
    };
    let found = [ids("adds_before", "before"), ids("adds_after", "after")];
    let found: Vec<String> = found.into_iter().flatten().collect();
    if found.is_empty() { "nothing to".into() } else { found.join(" and ") }
}

fn rope_scaling(spec: &ModelSpec) -> String {
    match &spec.rope.scaling {
        RopeScaling::None => String::new(),
        RopeScaling::Linear { factor } => format!(", linear scaling by {factor}"),
        RopeScaling::Dynamic { factor } => {
            format!(", dynamic scaling by {factor}, which changes nothing up to the context")
        }
        RopeScaling::Yarn { factor, original_context, .. } => {
            format!(", YaRN by {factor} from {original_context} positions")
        }
        RopeScaling::Factors(_) => ", each frequency divided by a factor of its own".into(),
        RopeScaling::Llama3 { factor, original_context, .. } => {
            format!(", Llama 3 scaling by {factor} from {original_context} positions")
        }
    }
}

/// What is said of weights with a scale for each group of a row, where there are any.
fn groups_of(report: &Report, activations: ActivationType) -> Option<String> {
    let mut widths: Vec<usize> = report.tensors.iter().filter_map(|tensor| tensor.group).collect();
    widths.sort_unstable();
    widths.dedup();
    let widths: Vec<String> = widths.iter().map(usize::to_string).collect();
    let how = match activations {
        ActivationType::F32 => "inputs stay floats",
        ActivationType::Int8 => "inputs are rounded to int8, with a scale for each quarter of a group",
        _ => "inputs are rounded to sums of two int8 values (int8x2)",
    };
    (!widths.is_empty()).then(|| format!("a scale for each {} weights of a row; {how}", widths.join(" or ")))
}

fn quantization(spec: &ModelSpec) -> String {
    match &spec.quantization {
        None => "no: all projections are dense, and their inputs stay floats".into(),
        Some(q) => {
            let how = if q.online { "quantised at load from floats" } else { "packed" };
            let scale = match q.scale_use {
                ScaleUse::Multiplies => "a stored scale multiplies",
                ScaleUse::Divides => "a stored scale divides",
            };
            format!("{how}; {scale}; inputs are rounded to int8")
        }
    }
}

pub(super) fn millions(count: u64) -> String {
    match count {
        0..1_000_000 => format!("{:.1} K", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.2} G", count as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_short() {
        assert_eq!(millions(1500), "1.5 K");
        assert_eq!(millions(2_084_000_000), "2.08 G");
    }
}
