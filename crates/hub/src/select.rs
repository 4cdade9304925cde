//! Which files of a repository make its model: those that a reader of it opens, and no others.
//!
//! A repository often holds the same weights several times (`.bin`, `.pt`, `.onnx`, a dozen GGUF files). The rules are those by
//! which a folder is read: a checkpoint in safetensors comes before GGUF, and GGUF before ONNX.

use ternion_core::{Error, ErrorKind, Result, config::ByteSize};

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Its path in the repository, with `/`.
    pub(crate) name: String,
    /// Its bytes, where the hub says.
    pub(crate) size: Option<u64>,
}

/// The files that make a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selection {
    /// What is opened: a file, or a folder (`""` for the top).
    pub(crate) open: String,
    /// All files that it needs, of which some may be optional and absent from the repository.
    pub(crate) files: Vec<String>,
    /// The index that names further files, the shards of a model.
    pub(crate) index: Option<String>,
}

/// Files beside the weights that say how they are used.
const SIDE_FILES: [&str; 17] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "genai_config.json",
    "quantize_config.json",
    MODULES,
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
];

/// What makes a model one for embeddings, with a folder for each of its modules, such as `1_Pooling`.
const MODULES: &str = "modules.json";
const MODULE_FILES: [&str; 2] = ["config.json", "model.safetensors"];

/// Those of them that make a tokenizer, with the configuration that may say more of it.
const TOKENIZER_FILES: [&str; 10] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// The file that a tokenizer is read from.
const TOKENIZER: &str = "tokenizer.json";

/// A folder of side files.
const TEMPLATES: &str = "additional_chat_templates";

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The files of the model that `path` names (`None`: the repository's).
///
/// # Errors
/// [`NotFound`](ErrorKind::NotFound) where there is no such file or no model; [`Unsupported`](ErrorKind::Unsupported) where there
/// are several, listing them with their sizes.
pub(crate) fn select(all: &[RemoteFile], path: Option<&str>) -> Result<Selection> {
    match path {
        Some(path) if all.iter().any(|file| file.name == path) => Ok(file(all, path)),
        Some(path) if within(all, path).next().is_some() => folder(all, path),
        Some(path) => Err(Error::new(
            ErrorKind::NotFound,
            format!("the repository has no file or folder `{path}`; it has: {}", listed(&weights(all, ""))),
        )),
        None => folder(all, ""),
    }
}

/// The files of the tokenizer of the model that `path` names (`None`: the repository's), without its weights where it lies
/// beside them. A GGUF file has it inside and is taken whole.
///
/// # Errors
/// As [`select`].
pub(crate) fn select_tokenizer(all: &[RemoteFile], path: Option<&str>) -> Result<Selection> {
    let has = |name: &str| all.iter().any(|file| file.name == name);
    let named = path.unwrap_or_default();
    let (above, _) = split(named);
    let places = match path {
        Some(path) if has_extension(path, "gguf") => Vec::new(),
        // A graph may lie in a folder below its tokenizer.
        Some(path) if has(path) => vec![above, split(above).0],
        _ => vec![named],
    };
    let Some(folder) = places.into_iter().find(|folder| has(&join(folder, TOKENIZER))) else {
        return select(all, path);
    };
    let mut files = side_files(all, folder);
    let templates = join(folder, TEMPLATES);
    files.retain(|name| {
        let (place, own) = split(name);
        place == templates || (place == folder && TOKENIZER_FILES.contains(&own))
    });
    Ok(Selection { open: folder.to_owned(), files, index: None })
}

/// The model in a folder.
fn folder(all: &[RemoteFile], folder: &str) -> Result<Selection> {
    let at = |name: &str| join(folder, name);
    let has = |name: &str| all.iter().any(|file| file.name == at(name));
    if has("config.json") && (has(WEIGHTS) || has(INDEX)) {
        let mut files = side_files(all, folder);
        // Where both are there, readers take the single file.
        let index = (!has(WEIGHTS)).then(|| at(INDEX));
        files.push(index.clone().unwrap_or_else(|| at(WEIGHTS)));
        return Ok(Selection { open: folder.to_owned(), files, index });
    }
    let found = weights(all, folder);
    let of = |extension: &str| -> Vec<&RemoteFile> {
        found.iter().copied().filter(|file| has_extension(&file.name, extension)).collect()
    };
    for candidates in [of("gguf"), of("onnx"), of("safetensors")] {
        match &candidates[..] {
            [] => {}
            [one] => return Ok(file(all, &one.name)),
            several => {
                return Err(Error::unsupported(format!(
                    "the repository holds {} models; add the name of one to the address: {}",
                    several.len(),
                    listed(several)
                )));
            }
        }
    }
    Err(Error::new(
        ErrorKind::NotFound,
        "the repository holds no model that can be read; expected safetensors with a config.json, GGUF or ONNX",
    ))
}

/// A file of weights, with what belongs to it.
fn file(all: &[RemoteFile], name: &str) -> Selection {
    let (folder, _) = split(name);
    let mut files = vec![name.to_owned()];
    let mut index = None;
    if has_extension(name, "gguf") {
        // Everything else is in the file.
        files = parts(all, name);
    } else if has_extension(name, "onnx") {
        // Weights in files of their own have names that begin with that of the graph. Some tools drop its extension.
        let stem = name.strip_suffix(".onnx").unwrap_or(name);
        let data = all.iter().map(|file| &file.name).filter(|other| {
            let rest = other.strip_prefix(stem).unwrap_or_default();
            rest.starts_with('.') && rest.contains("data")
        });
        files.extend(data.cloned());
        files.extend(side_files(all, folder));
        if !folder.is_empty() {
            let (above, _) = split(folder);
            files.extend(side_files(all, above));
        }
    } else {
        if name.ends_with(".safetensors.index.json") {
            index = Some(name.to_owned());
        }
        files.extend(side_files(all, folder));
    }
    files.dedup();
    Selection { open: name.to_owned(), files, index }
}

/// All parts of a GGUF model of which this is one (`model-00001-of-00003.gguf`), the first one first; else the file itself.
fn parts(all: &[RemoteFile], name: &str) -> Vec<String> {
    let Some((series, _, total)) = part(name) else { return vec![name.to_owned()] };
    let mut parts: Vec<String> = all
        .iter()
        .map(|file| &file.name)
        .filter(|o| part(o).is_some_and(|p| (p.0, p.2) == (series, total)))
        .cloned()
        .collect();
    parts.sort();
    parts
}

/// Whether files that are parts of a GGUF model are all of its parts.
pub(crate) fn has_all_parts(files: &[String]) -> bool {
    let total = files.first().and_then(|name| part(name)?.2.parse::<usize>().ok());
    total.is_none_or(|total| total == files.len())
}

/// The name before the number, the number, and the total of a file that is part of a GGUF model.
fn part(name: &str) -> Option<(&str, &str, &str)> {
    let (before, total) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (series, number) = before.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    (digits(number) && digits(total)).then_some((series, number, total))
}

/// The models in a folder and below: no vision towers, no adapters, no later parts of a model.
fn weights<'a>(all: &'a [RemoteFile], folder: &str) -> Vec<&'a RemoteFile> {
    let is_model = |file: &&RemoteFile| {
        let (_, name) = split(&file.name);
        let known = ["gguf", "onnx", "safetensors"].iter().any(|extension| has_extension(name, extension));
        let lower = name.to_ascii_lowercase();
        known
            && !lower.contains("mmproj")
            && !lower.starts_with("adapter")
            && part(name).is_none_or(|p| p.1 == "00001")
    };
    within(all, folder).filter(is_model).collect()
}

fn within<'a>(all: &'a [RemoteFile], folder: &str) -> impl Iterator<Item = &'a RemoteFile> {
    let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
    all.iter().filter(move |file| file.name.starts_with(&prefix))
}

fn side_files(all: &[RemoteFile], folder: &str) -> Vec<String> {
    let templates = join(folder, TEMPLATES);
    let modules = join(folder, MODULES);
    let has_modules = all.iter().any(|file| file.name == modules);
    let is_module = |place: &str| {
        let (above, own) = split(place);
        let number = own.split_once('_').map_or("", |(number, _)| number);
        above == folder && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
    };
    let is_side = |name: &str| {
        let (place, own) = split(name);
        (place == folder && SIDE_FILES.contains(&own))
            || place == templates
            || (has_modules && is_module(place) && MODULE_FILES.contains(&own))
    };
    all.iter().map(|file| &file.name).filter(|name| is_side(name)).cloned().collect()
}

/// Folder and name.
pub(crate) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// A path in a folder.
pub(crate) fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

fn has_extension(name: &str, extension: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, found)| found.eq_ignore_ascii_case(extension))
}

fn listed(files: &[&RemoteFile]) -> String {
    let one = |file: &&RemoteFile| match file.size {
        Some(size) => format!("`{}` ({})", file.name, ByteSize(size)),
        None => format!("`{}`", file.name),
    };
    if files.is_empty() {
        "no models".to_owned()
    } else {
        files.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(names: &[&str]) -> Vec<RemoteFile> {
        names.iter().map(|name| RemoteFile { name: (*name).to_owned(), size: Some(1_000_000) }).collect()
    }

    fn files(names: &[&str], path: Option<&str>) -> (String, Vec<String>) {
        let selection = select(&repo(names), path).unwrap();
        (selection.open, selection.files)
    }

    #[test]
    fn twins_in_other_formats_stay_where_they_are() {
        let (open, files) = files(
            &[
                ".gitattributes",
                "README.md",
                "config.json",
                "model.safetensors",
                "pytorch_model.bin",
                "original/consolidated.00.pth",
                "onnx/model.onnx",
                "tokenizer.json",
                "model.gguf",
                "additional_chat_templates/tool_use.jinja",
                "modeling_bitnet.py",
            ],
            None,
        );
        assert_eq!(open, "");
        let expected = [
            "config.json",
            "tokenizer.json",
            "additional_chat_templates/tool_use.jinja",
            "model.safetensors",
        ];
        assert_eq!(files, expected);
    }

    #[test]
    fn shards_are_named_by_their_index() {
        let all = repo(&["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json"]);
        let selection = select(&all, None).unwrap();
        assert_eq!(selection.index.as_deref(), Some(INDEX));
        assert_eq!(selection.files, ["config.json", "tokenizer.json", INDEX]);
    }

    #[test]
    fn one_gguf_file_is_the_model_and_several_are_a_question() {
        let alone = files(&["README.md", "ggml-model-i2_s.gguf", "mmproj-f16.gguf", "config.json"], None);
        assert_eq!(alone, ("ggml-model-i2_s.gguf".to_owned(), vec!["ggml-model-i2_s.gguf".to_owned()]));
        let two = ["m-F16.gguf", "m-Q2_0.gguf"];
        let error = select(&repo(&two), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("`m-F16.gguf` (1.0 MB), `m-Q2_0.gguf` (1.0 MB)"), "{error}");
        assert_eq!(files(&two, Some("m-Q2_0.gguf")).1, ["m-Q2_0.gguf"]);
    }

    #[test]
    fn parts_of_one_model_belong_together() {
        let all = ["q/m-00002-of-00002.gguf", "q/m-00001-of-00002.gguf", "q/n-00001-of-00002.gguf", "q/x.md"];
        let error = select(&repo(&all), None).unwrap_err().to_string();
        assert!(error.contains("holds 2 models"), "{error}");
        let parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
        assert_eq!(files(&all, Some(parts[0])), (parts[0].to_owned(), parts.map(str::to_owned).to_vec()));
    }

    #[test]
    fn a_graph_has_its_data_and_the_tokenizer_above_it() {
        let all = [
            "config.json",
            "tokenizer.json",
            "onnx/model_q4.onnx",
            "onnx/model_q4.onnx_data",
            "onnx/model.onnx",
        ];
        let (open, files) = files(&all, Some("onnx/model_q4.onnx"));
        assert_eq!(open, "onnx/model_q4.onnx");
        assert_eq!(files, ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json", "tokenizer.json"]);
    }

    #[test]
    fn a_tokenizer_needs_no_weights_unless_it_is_inside_of_them() {
        let all = repo(&[
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "additional_chat_templates/tool_use.jinja",
            "onnx/model.onnx",
            "m.gguf",
        ]);
        let own = [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "additional_chat_templates/tool_use.jinja",
        ];
        for path in [None, Some("model.safetensors"), Some("onnx/model.onnx"), Some("tokenizer.json")] {
            let selection = select_tokenizer(&all, path).unwrap();
            assert_eq!((selection.open.as_str(), &selection.files[..]), ("", &own.map(str::to_owned)[..]));
        }
        let inside = select_tokenizer(&all, Some("m.gguf")).unwrap();
        assert_eq!((inside.open.as_str(), &inside.files[..]), ("m.gguf", &["m.gguf".to_owned()][..]));
        assert_eq!(select_tokenizer(&repo(&["q/m.gguf"]), None).unwrap().files, ["q/m.gguf"]);
        assert_eq!(select_tokenizer(&all, Some("x.json")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_model_for_embeddings_has_its_modules() {
        let all = [
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "2_Dense/pytorch_model.bin",
            "config.json",
            "model.safetensors",
            "modules.json",
            "onnx/config.json",
            "openvino/model.bin",
            "sentence_bert_config.json",
            "tokenizer.json",
        ];
        let expected = [
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "config.json",
            "modules.json",
            "sentence_bert_config.json",
            "tokenizer.json",
            "model.safetensors",
        ];
        assert_eq!(files(&all, None).1, expected);
        let tokenizer = select_tokenizer(&repo(&all), None).unwrap();
        assert_eq!(tokenizer.files, ["config.json", "tokenizer.json"]);
        let without: Vec<&str> = all.into_iter().filter(|name| *name != "modules.json").collect();
        assert!(!files(&without, None).1.contains(&"1_Pooling/config.json".to_owned()));
    }

    #[test]
    fn what_is_not_there_is_told() {
        let error = select(&repo(&["README.md"]), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let error = select(&repo(&["a.gguf"]), Some("b.gguf")).unwrap_err().to_string();
        assert!(error.contains("no file or folder `b.gguf`; it has: `a.gguf`"), "{error}");
    }
}
