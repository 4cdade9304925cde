//! How an exported decoder wants to be fed: read from the names, types and shapes that its file declares.
//!
//! The names are those of Hugging Face exports, whoever made them: `input_ids`, `attention_mask`, `position_ids` (the last
//! two where the graph has them), `past_key_values.N.key/value` of `[batch, kv_heads, past, head_dim]`; out come `logits` and
//! `present.N.key/value`, or `present_key_values.N...`. A genai_config.json may name them otherwise. Old exports hold two
//! graphs, of which the input `use_cache_branch` chooses one. An input that is not known would have to be guessed, so
//! it is an error.

use ternion_core::{Error, Result};
use ternion_formats::onnx::{Element, Host, Size, Summary, Value};

use crate::attributes::MOST_WIDTH;
use crate::model::MOST_LOGITS;

const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";
const POSITIONS: &str = "position_ids";
const LOGITS: &str = "logits";
const BRANCH: &str = "use_cache_branch";

/// Names of the input that says how many of the last tokens' logits are wanted.
const KEEP: [&str; 2] = ["num_logits_to_keep", "logits_to_keep"];

/// What the names of past keys and values begin with, and those of the present ones.
const PAST: [&str; 2] = ["past_key_values.", "past."];
const PRESENT: [&str; 3] = ["present.", "present_key_values.", "present_"];

/// An input of integers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Integers {
    pub(crate) name: String,
    /// 32 bits instead of 64.
    pub(crate) is_i32: bool,
    pub(crate) rank: usize,
}

/// Keys, or values, of one layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cache {
    pub(crate) past: String,
    pub(crate) present: String,
    pub(crate) heads: usize,
    pub(crate) width: usize,
}

/// See the module's comment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub(crate) ids: Integers,
    pub(crate) mask: Option<Integers>,
    pub(crate) positions: Option<Integers>,
    pub(crate) keep: Option<Integers>,
    /// The graph holds a decoder for a beginning and one for a single token behind a past; this boolean chooses the latter.
    pub(crate) branch: Option<String>,
    pub(crate) logits: String,
    pub(crate) caches: Vec<Cache>,
    /// The caches hold f16 instead of f32.
    pub(crate) is_f16: bool,
    /// All caches go through operators that append in place where past and present are the same buffer.
    pub(crate) in_place: bool,
    pub(crate) vocab_size: usize,
}

impl Layout {
    pub(crate) fn read(summary: &Summary, host: &Host) -> Result<Self> {
        read(summary, host).map_err(|e| e.with("file", summary.path.display()))
    }
}

fn read(summary: &Summary, host: &Host) -> Result<Layout> {
    let names = |values: &[Value]| {
        let shown: Vec<&str> = values.iter().take(6).map(|v| v.name.as_str()).collect();
        format!("{}{}", shown.join(", "), if values.len() > 6 { ", .." } else { "" })
    };
    let [ids_name, mask_name, positions_name, logits_name] = match &host.names {
        Some(n) => [&n.input_ids, &n.attention_mask, &n.position_ids, &n.logits].map(String::as_str),
        None => [IDS, MASK, POSITIONS, LOGITS],
    };
    let ids = summary.input(ids_name).ok_or_else(|| {
        Error::invalid_model(format!("has no input `{ids_name}`; its inputs are {}", names(&summary.inputs)))
    })?;
    let logits = summary.output(logits_name).ok_or_else(|| {
        Error::invalid_model(format!(
            "has no output `{logits_name}`; its outputs are {}",
            names(&summary.outputs)
        ))
    })?;
    if !matches!(logits.element, Some(Element::F32 | Element::F16)) {
        return Err(wrong_type(logits, "float or float16"));
    }
    let vocab_size = vocab_size(logits, host)?;
    let mut layout = Layout {
        ids: integers(ids)?,
        mask: summary.input(mask_name).map(integers).transpose()?,
        positions: summary.input(positions_name).map(integers).transpose()?,
        keep: KEEP.iter().find_map(|name| summary.input(name)).map(integers).transpose()?,
        branch: summary.input(BRANCH).map(branch).transpose()?,
        logits: logits.name.clone(),
        caches: Vec::new(),
        is_f16: false,
        in_place: true,
        vocab_size,
    };
    for input in &summary.inputs {
        let name = input.name.as_str();
        let known = [ids_name, mask_name, positions_name, BRANCH].contains(&name) || KEEP.contains(&name);
        match presents(host, name) {
            Some(presents) => {
                let (cache, is_f16) = cache(summary, host, input, &presents)?;
                if !layout.caches.is_empty() && is_f16 != layout.is_f16 {
                    return Err(Error::unsupported(
                        "has caches of float and of float16, expected one of them",
                    ));
                }
                layout.is_f16 = is_f16;
                layout.in_place &= appends_in_place(summary, &cache, layout.mask.is_some());
                layout.caches.push(cache);
            }
            // What has a value of its own may be left out.
            None if known || summary.initializer(name).is_some() => {}
            None => {
                return Err(Error::unsupported(format!(
                    "has an input `{name}`, which is not known; known: {ids_name}, {mask_name}, {positions_name}, {}, \
                     {BRANCH}, past_key_values.N.key and .value",
                    KEEP[0]
                )));
            }
        }
    }
    if layout.caches.is_empty() {
        return Err(Error::unsupported(format!(
            "has no KV cache: inputs `past_key_values.N.key` and `.value` expected; its inputs are {}",
            names(&summary.inputs)
        )));
    }
    // A genai_config.json only fills gaps: its sizes are for a runtime that does not look at the graph.
    let layers = host.layers.filter(|_| host.names.is_none());
    if let Some(layers) = layers.filter(|layers| 2 * layers != layout.caches.len()) {
        return Err(Error::invalid_model(format!(
            "has {} inputs for past keys and values, but `num_hidden_layers` in config.json is {layers}",
            layout.caches.len()
        )));
    }
    if !layout.in_place {
        tracing::info!("the graph copies the past for every step; one with GroupQueryAttention does not");
    }
    Ok(layout)
}

/// Names that the present may have where an input of this name is a past; `None` where it is none.
fn presents(host: &Host, input: &str) -> Option<Vec<String>> {
    if let Some(present) = host.names.as_ref().and_then(|names| names.present_of(input)) {
        return Some(vec![present]);
    }
    let rest = PAST.iter().find_map(|prefix| input.strip_prefix(prefix))?;
    Some(PRESENT.iter().map(|prefix| format!("{prefix}{rest}")).collect())
}

fn branch(value: &Value) -> Result<String> {
    match (value.element, value.dims.as_deref()) {
        (Some(Element::Bool), Some([_])) => Ok(value.name.clone()),
        _ => Err(wrong_type(value, "a list of one boolean")),
    }
}

fn wrong_type(value: &Value, expected: &str) -> Error {
    let found = value.element.map_or_else(|| "no tensor".to_owned(), |e| e.to_string());
    Error::unsupported(format!("`{}` is {found}, expected {expected}", value.name))
}

fn integers(value: &Value) -> Result<Integers> {
    let is_i32 = match value.element {
        Some(Element::I64) => false,
        Some(Element::I32) => true,
        _ => return Err(wrong_type(value, "int64 or int32")),
    };
    let rank = value.dims.as_ref().map_or(2, Vec::len);
    let expected = if KEEP.contains(&&*value.name) { 0..=1 } else { 2..=2 };
    if !expected.contains(&rank) {
        return Err(Error::unsupported(format!(
            "`{}` has {rank} dimensions, expected [batch, sequence]",
            value.name
        )));
    }
    Ok(Integers { name: value.name.clone(), is_i32, rank })
}

fn vocab_size(logits: &Value, host: &Host) -> Result<usize> {
    let Some(dims) = logits.dims.as_ref().filter(|dims| dims.len() == 3) else {
        let dims = &logits.dims;
        return Err(Error::unsupported(format!(
            "`{LOGITS}` is {dims:?}, expected [batch, sequence, vocabulary]"
        )));
    };
    match (&dims[2], host.vocab_size) {
        (Size::Known(found @ 1..=MOST_LOGITS), Some(expected))
            if *found != expected as i64 && host.names.is_none() =>
        {
            Err(Error::invalid_model(format!(
                "the logits have {found} elements, but `vocab_size` in config.json is {expected}"
            )))
        }
        (Size::Known(found @ 1..=MOST_LOGITS), _) => Ok(*found as usize),
        (Size::Known(found), _) => Err(Error::invalid_model(format!(
            "`{LOGITS}` has {found} elements for a token, expected 1 to {MOST_LOGITS}"
        ))),
        (_, Some(expected)) => Ok(expected),
        _ => Err(Error::invalid_model(
            "neither the graph nor a config.json beside it says how many logits there are",
        )),
    }
}

/// The cache whose past is `input` and whose present has one of these names, and whether it holds f16.
fn cache(summary: &Summary, host: &Host, input: &Value, presents: &[String]) -> Result<(Cache, bool)> {
    let is_f16 = match input.element {
        Some(Element::F32) => false,
        Some(Element::F16) => true,
        _ => return Err(wrong_type(input, "float or float16")),
    };
    let present = presents.iter().find(|name| summary.output(name).is_some()).cloned().ok_or_else(|| {
        Error::invalid_model(format!("has an input `{}` but no output `{}`", input.name, presents[0]))
    })?;
    let dims = input.dims.as_deref().unwrap_or_default();
    let [_, heads, past, width] = dims else {
        let message = format!("`{}` is {dims:?}, expected [batch, kv_heads, past, head_dim]", input.name);
        return Err(Error::unsupported(message));
    };
    if let Size::Known(length) = past {
        return Err(Error::unsupported(format!(
            "`{}` has room for exactly {length} past tokens, expected a dimension that is open",
            input.name
        )));
    }
    // What the configuration says is checked; what follows from other keys only fills a gap.
    let size = |found: &Size, key: &str, said: Option<usize>, other: Option<usize>| match (
        found,
        said.filter(|_| host.names.is_none()),
        said.or(other),
    ) {
        (Size::Known(found), Some(said), _) if *found != said as i64 => Err(Error::invalid_model(format!(
            "`{}` has {found} for `{key}`, but config.json says {said}",
            input.name
        ))),
        (Size::Known(found @ 1..=0x10_0000), ..) => Ok(*found as usize),
        (Size::Named(_) | Size::Open, _, Some(size)) => Ok(size),
        _ => Err(Error::invalid_model(format!(
            "`{}` is {dims:?} and no config.json beside the model says more; a size for `{key}` expected",
            input.name
        ))),
    };
    let per_head = host.hidden_size.zip(host.heads).map(|(hidden, heads)| hidden / heads).filter(|d| *d > 0);
    let heads = size(heads, "num_key_value_heads", host.kv_heads, host.heads)?;
    let width = size(width, "head_dim", host.head_dim, per_head)?;
    if heads.checked_mul(width).is_none_or(|elements| elements > MOST_WIDTH) {
        return Err(Error::invalid_model(format!(
            "`{}` has {heads} heads of {width} elements, expected at most {MOST_WIDTH} elements for a token",
            input.name
        )));
    }
    Ok((Cache { past: input.name.clone(), present, heads, width }, is_f16))
}

/// Whether the past is used by a GroupQueryAttention alone, which makes the present. Where both are the same buffer, with
/// room for more, it writes behind the tokens that the mask counts.
fn appends_in_place(summary: &Summary, cache: &Cache, has_mask: bool) -> bool {
    let users = |name: &str| {
        let inner = summary.inner_nodes.iter();
        summary.nodes.iter().chain(inner).flat_map(|n| &n.inputs).filter(|i| *i == name).count()
    };
    let node = summary.nodes.iter().find(|node| node.outputs.contains(&cache.present));
    let Some(node) = node.filter(|n| n.domain == "com.microsoft" && n.operator == "GroupQueryAttention")
    else {
        return false;
    };
    let place = |names: &[String], name: &str| names.iter().position(|n| n == name);
    matches!(
        (place(&node.inputs, &cache.past), place(&node.outputs, &cache.present)),
        (Some(3), Some(1)) | (Some(4), Some(2))
    ) && users(&cache.past) == 1
        && users(&cache.present) == 0
        && has_mask
}
