//! ONNX files that lie, are damaged, or reach for other files: each is an error that says what is wrong.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::path::{Path, PathBuf};

use ternion_core::{Error, ErrorKind};
use ternion_formats::onnx::{Attribute, Element, Size, Summary};

/// A message, written field by field.
#[derive(Clone, Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw(mut self, number: u64, kind: u64, bytes: &[u8]) -> Self {
        self.varint(number << 3 | kind);
        self.0.extend(bytes);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn int(self, number: u64, value: i64) -> Self {
        let mut this = self.raw(number, 0, &[]);
        this.varint(value as u64);
        this
    }

    fn bytes(self, number: u64, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let mut this = self.raw(number, 2, &[]);
        this.varint(bytes.len() as u64);
        this.0.extend(bytes);
        this
    }

    fn message(self, number: u64, message: &Message) -> Self {
        self.bytes(number, &message.0)
    }
}

fn new() -> Message {
    Message::default()
}

fn opset(domain: &str, version: i64) -> Message {
    new().bytes(1, domain).int(2, version)
}

/// A tensor of floats; its data follows.
fn tensor(name: &str, dims: &[i64]) -> Message {
    dims.iter().fold(new(), |m, d| m.int(1, *d)).int(2, 1).bytes(8, name)
}

fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> Message {
    let entry = |m: Message, (key, value): &(&str, &str)| m.message(13, &new().bytes(1, key).bytes(2, value));
    entries.iter().fold(tensor(name, dims), entry).int(14, 1)
}

fn value(name: &str, element: i64) -> Message {
    let shape = new().message(1, &new().bytes(2, "batch")).message(1, &new().int(1, 7)).message(1, &new());
    new().bytes(1, name).message(2, &new().message(1, &new().int(1, element).message(2, &shape)))
}

fn attribute(name: &str, value: i64) -> Message {
    new().bytes(1, name).int(3, value).int(20, 2)
}

fn node(operator: &str, domain: &str) -> Message {
    new().bytes(1, "x").bytes(2, "y").bytes(4, operator).bytes(7, domain)
}

fn model(graph: &Message) -> Message {
    new().int(1, 10).bytes(2, "test").message(8, &opset("", 21)).message(7, graph)
}

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("model.onnx")
    }

    fn write(&self, model: &Message) -> Result<Summary, Error> {
        std::fs::write(self.path(), &model.0).unwrap();
        Summary::read(self.path())
    }
}

fn read(model: &Message) -> Result<Summary, Error> {
    Case::new().write(model)
}

fn refused(model: &Message, words: &str) {
    let error = read(model).map(|_| ()).expect_err(words);
    let line = error.to_string();
    assert!(line.contains(words) && line.contains("model.onnx"), "{words}: {line}");
    assert!(!line.contains('\n') && line.len() < 600, "{line}");
}

#[test]
fn a_good_file_is_read() {
    let graph = new()
        .message(1, &node("Relu", "").message(5, &attribute("axis", -1)))
        .message(5, &tensor("w", &[2, 3]).bytes(9, [0; 24]))
        .message(5, &tensor("s", &[]).bytes(4, [0; 4]))
        .message(11, &value("x", 7))
        .message(12, &value("y", 1));
    let summary = read(&model(&graph)).unwrap();
    assert_eq!(summary.producer, "test");
    assert_eq!((summary.opset(""), summary.opset("com.microsoft")), (Some(21), None));
    assert_eq!(summary.input("x").unwrap().element, Some(Element::I64));
    let dims = summary.output("y").unwrap().dims.clone().unwrap();
    assert_eq!(dims, [Size::Named("batch".into()), Size::Known(7), Size::Open]);
    assert_eq!(summary.initializer("w").unwrap().dims, [2, 3]);
    assert_eq!(summary.data_bytes(), 28);
    assert_eq!(summary.nodes[0].attributes, [("axis".to_owned(), Attribute::Integer(-1))]);
    summary.check_operators(17).unwrap();
}

#[test]
fn every_truncation_is_an_error_or_a_smaller_file() {
    let graph = new()
        .message(1, &node("Relu", ""))
        .message(5, &tensor("w", &[2, 3]).bytes(9, [0; 24]))
        .message(11, &value("x", 7));
    let whole = model(&graph).0;
    for end in 1..whole.len() {
        let result = read(&Message(whole[..end].to_vec()));
        let line = result.expect_err("without the graph's end there is no graph").to_string();
        assert!(line.contains("truncated") || line.contains("holds no graph"), "{end}: {line}");
    }
}

#[test]
fn what_is_no_model_is_refused() {
    refused(&Message(b"GGUF\x03\0\0\0".to_vec()), "is no ONNX model");
    refused(&Message(b"<html><body>not found".to_vec()), "is no ONNX model");
    refused(&new().int(1, 10), "holds no graph");
    refused(&Message(Vec::new()), "empty");
    refused(&model(&new().message(1, &new().bytes(1, "x"))), "has no operator");
    refused(&model(&new().message(11, &new())), "has no name");
    refused(
        &model(&new().message(11, &new().bytes(1, "n".repeat(2000)))),
        "2000 bytes, expected at most 1024",
    );
    refused(&model(&new()).message(20, &new()), "training information");
}

#[test]
fn graphs_in_graphs_are_followed_and_bounded() {
    // An operator of an unknown domain, two graphs deep.
    let mut graph = new().message(1, &node("Evil", "com.example"));
    for _ in 0..2 {
        graph = new().message(1, &node("If", "").message(5, &new().bytes(1, "then").message(6, &graph)));
    }
    let error = read(&model(&graph)).unwrap().check_operators(32).unwrap_err().to_string();
    assert!(error.contains("`Evil` of the domain `com.example`"), "{error}");
    for _ in 0..60 {
        graph = new().message(1, &node("If", "").message(5, &new().bytes(1, "then").message(6, &graph)));
    }
    refused(&model(&graph), "nested more than 100 deep");
    // A tensor that reaches out of the folder, within a node's attribute.
    let evil = external("w", &[1], &[("location", "/etc/passwd")]);
    let constant = node("Constant", "").message(5, &new().bytes(1, "value").message(5, &evil));
    refused(&model(&new().message(1, &constant)), "absolute");
}

#[test]
fn data_that_is_not_what_the_shape_says() {
    let case = |tensor: &Message, words: &str| refused(&model(&new().message(5, tensor)), words);
    case(
        &tensor("w", &[2, 3]).bytes(9, [0; 20]),
        "has 20 bytes of data, expected 24 for the shape [2, 3] of float",
    );
    case(&tensor("w", &[2, 3]).bytes(4, [0; 20]), "has 5 elements of data, expected 6");
    case(&tensor("w", &[2, 3]), "has 0 elements of data, expected 6");
    case(&tensor("w", &[-1, 3]).bytes(9, [0; 12]), "[-1, 3], a size is negative");
    case(&tensor("w", &[1 << 40, 1 << 40]).bytes(9, [0; 12]), "more elements than there can be");
    case(&tensor("w", &[1]).bytes(9, [0; 4]).bytes(4, [0; 4]), "has its data twice");
    let strings = new().int(1, 1).int(2, 8).bytes(8, "w").bytes(9, [0; 4]);
    case(&strings, "holds strings as bytes");
    // In the list of sparse tensors as well.
    let sparse = new().message(1, &tensor("values", &[2]).bytes(9, [0; 4]));
    refused(&model(&new().message(15, &sparse)), "has 4 bytes of data, expected 8");
}

fn external_case(case: &Case, entries: &[(&str, &str)], words: &str) {
    let graph = new().message(5, &external("w", &[2, 3], entries));
    let error = case.write(&model(&graph)).map(|_| ()).expect_err(words).to_string();
    assert!(error.contains(words), "{entries:?}: {error}");
}

#[test]
fn external_data_stays_in_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, [0; 100]).unwrap();
    let case = Case::new();
    let data = case.folder.path().join("data");
    std::fs::write(&data, [0; 100]).unwrap();
    std::fs::create_dir(case.folder.path().join("sub")).unwrap();
    for location in [
        secret.to_str().unwrap(),
        "../secret",
        "sub/../../secret",
        "sub/../data",
        "./../data",
        "..",
        "",
        "C:\\data",
        "c:data",
        "sub\\..\\data",
    ] {
        external_case(&case, &[("location", location)], "absolute, empty or contains `..`");
    }
    external_case(&case, &[("location", "sub")], "no regular file");
    external_case(&case, &[], "without a location");
    external_case(&case, &[("location", "none")], "no such file");
    // The runtime's own mark for an address in memory is no file either.
    external_case(&case, &[("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096")], "no such file");
}

#[cfg(unix)]
#[test]
fn links_out_of_the_folder_are_refused() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, [0; 100]).unwrap();
    let case = Case::new();
    let inside = |name: &str| case.folder.path().join(name);
    symlink(&secret, inside("link")).unwrap();
    external_case(&case, &[("location", "link")], "symbolic link that leaves the folder");
    symlink(outside.path(), inside("folder")).unwrap();
    external_case(&case, &[("location", "folder/secret")], "symbolic link that leaves the folder");
    symlink("nowhere", inside("dangling")).unwrap();
    external_case(&case, &[("location", "dangling")], "no such file");

    // The folders are on the same file system, so a hard link can be made.
    std::fs::hard_link(&secret, inside("hard")).unwrap();
    external_case(&case, &[("location", "hard")], "hard link");

    // A link that stays inside is as good as its target.
    std::fs::write(inside("data"), [0; 100]).unwrap();
    symlink("data", inside("alias")).unwrap();
    let graph = new().message(5, &external("w", &[2, 3], &[("location", "alias")]));
    case.write(&model(&graph)).unwrap();
}

/// As `huggingface_hub` lays out its cache: files are links to blobs with hashes for names.
#[cfg(unix)]
#[test]
fn data_in_the_hub_cache_is_found_through_its_links() {
    use std::os::unix::fs::symlink;
    let cache = tempfile::tempdir().unwrap();
    let repository = |name: &str| cache.path().join(name);
    for name in ["models--a--b", "models--c--d"] {
        std::fs::create_dir_all(repository(name).join("blobs")).unwrap();
        std::fs::create_dir_all(repository(name).join("snapshots/0123/onnx")).unwrap();
        std::fs::write(repository(name).join("blobs/f1"), [0; 100]).unwrap();
    }
    let folder = repository("models--a--b").join("snapshots/0123/onnx");
    let graph = new().message(5, &external("w", &[2, 3], &[("location", "model.onnx_data")]));
    std::fs::write(repository("models--a--b").join("blobs/f0"), model(&graph).0).unwrap();
    symlink("../../../blobs/f0", folder.join("model.onnx")).unwrap();
    let data = folder.join("model.onnx_data");
    let read = || Summary::read(folder.join("model.onnx"));
    symlink("../../../blobs/f1", &data).unwrap();
    let summary = read().unwrap();
    summary.check_unchanged().unwrap();
    // The link is turned to a file that was not checked.
    let secret = cache.path().join("secret");
    std::fs::write(&secret, [0; 100]).unwrap();
    let turn = |target: &Path| {
        std::fs::remove_file(&data).unwrap();
        symlink(target, &data).unwrap();
    };
    for target in
        [&secret, Path::new("../../../../models--c--d/blobs/f1"), &repository("models--a--b").join("f9")]
    {
        if target.ends_with("f9") {
            std::fs::write(target, [0; 100]).unwrap();
        }
        turn(target);
        let error = read().unwrap_err().to_string();
        assert!(error.contains("symbolic link that leaves the folder"), "{target:?}: {error}");
        let error = summary.check_unchanged().unwrap_err().to_string();
        assert!(
            error.contains("changed while the model was loaded") && error.contains("onnx_data"),
            "{error}"
        );
    }
    // Real files beside a real model, with links in another folder.
    let (own, links) = (cache.path().join("own"), cache.path().join("links"));
    for folder in [&own, &links] {
        std::fs::create_dir(folder).unwrap();
    }
    std::fs::write(own.join("model.onnx"), model(&graph).0).unwrap();
    std::fs::write(own.join("model.onnx_data"), [0; 100]).unwrap();
    for name in ["model.onnx", "model.onnx_data"] {
        symlink(own.join(name), links.join(name)).unwrap();
    }
    Summary::read(links.join("model.onnx")).unwrap();
}

#[test]
fn external_data_lies_within_its_file() {
    let case = Case::new();
    std::fs::write(case.folder.path().join("data"), [0; 100]).unwrap();
    let at = |offset: &'static str, length: &'static str| {
        [("location", "data"), ("offset", offset), ("length", length)]
    };
    external_case(&case, &at("80", "24"), "bytes 80 to 104 of a file of 100 bytes");
    external_case(&case, &at("18446744073709551615", "24"), "of a file of 100 bytes");
    external_case(&case, &at("0", "20"), "has 20 bytes of data, expected 24");
    external_case(&case, &at("0", "28"), "has 28 bytes of data, expected 24");
    external_case(&case, &at("-1", "24"), "offset of its data is \"-1\", expected a number");
    external_case(&case, &at("0", "0x18"), "length of its data is \"0x18\", expected a number");
    let graph = new().message(5, &external("w", &[2, 3], &at("76", "24")));
    case.write(&model(&graph)).unwrap();
    let both = new().message(5, &external("w", &[2, 3], &at("0", "24")).bytes(9, [0; 24]));
    let error = case.write(&model(&both)).unwrap_err().to_string();
    assert!(error.contains("in the file and beside it"), "{error}");
}

#[test]
fn operators_that_no_runtime_has_are_refused() {
    let check = |model: &Message, runtime: u32| read(model).unwrap().check_operators(runtime);
    let graph = |node: &Message| new().message(1, node);

    let error = check(&model(&graph(&node("Magic", "com.example"))), 32).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let line = error.to_string();
    assert!(
        line.contains("known domains: ai.onnx, ai.onnx.ml, com.microsoft,") && line.contains("ai.ternion"),
        "{line}"
    );

    // A function of that domain in the file itself makes it known.
    let function = new().bytes(1, "Magic").bytes(10, "com.example").message(7, &node("Relu", ""));
    check(&model(&graph(&node("Magic", "com.example"))).message(25, &function), 32).unwrap();

    let undeclared = model(&graph(&node("MatMulNBits", "com.microsoft")));
    assert!(check(&undeclared, 32).unwrap_err().to_string().contains("without saying which revision"));

    let newer = new().message(8, &opset("", 99)).message(7, &new());
    let line = check(&newer, 32).unwrap_err().to_string();
    assert!(line.contains("revision 99") && line.contains("at most 28"), "{line}");
    let none = new().message(8, &opset("com.microsoft", 1)).message(7, &new());
    assert!(check(&none, 32).unwrap_err().to_string().contains("does not say which revision"));
}

#[test]
fn parameters_of_blocked_products_are_checked() {
    let check = |attributes: &[(&str, i64)], weights: i64, zeros: Option<(i64, i64)>, runtime: u32| {
        let mut product = ["x", "w", "s", "z"]
            .iter()
            .fold(new(), |m, name| m.bytes(1, name))
            .bytes(2, "y")
            .bytes(3, "the product");
        product = product.bytes(4, "MatMulNBits").bytes(7, "com.microsoft");
        for (name, value) in attributes {
            product = product.message(5, &attribute(name, *value));
        }
        let bytes = new().int(1, weights).int(2, 2).bytes(8, "w").bytes(9, vec![0; weights as usize]);
        let mut graph =
            new().message(1, &product).message(5, &bytes).message(5, &tensor("s", &[8]).bytes(9, [0; 32]));
        if let Some((element, count)) = zeros {
            let size = if element == 6 { 4 } else { 1 };
            let zeros =
                new().int(1, count).int(2, element).bytes(8, "z").bytes(9, vec![0; (count * size) as usize]);
            graph = graph.message(5, &zeros);
        }
        let model = model(&graph).message(8, &opset("com.microsoft", 1));
        read(&model).unwrap().check_operators(runtime).map_err(|e| e.to_string())
    };
    // 4 rows of 64 columns, two blocks each.
    let good = [("K", 64), ("N", 4), ("bits", 4), ("block_size", 32)];
    let with = |key: &'static str, value: i64| {
        good.map(|(name, old)| if name == key { (name, value) } else { (name, old) })
    };
    check(&good, 128, Some((2, 4)), 17).unwrap();
    check(&with("bits", 2), 64, None, 24).unwrap();
    for (attributes, weights, zeros, runtime, words) in [
        (with("bits", 3), 128, None, 32, "`bits` of MatMulNBits is 3, expected 2, 4 or 8"),
        (with("bits", -4), 128, None, 32, "`bits` of MatMulNBits is -4"),
        (with("block_size", 33), 128, None, 32, "`block_size` of MatMulNBits is 33, expected a power of two"),
        (with("block_size", 0), 128, None, 32, "`block_size` of MatMulNBits is 0"),
        (with("K", 0), 128, None, 32, "`K` of MatMulNBits is 0"),
        (with("N", i64::MAX), 128, None, 32, "`N` of MatMulNBits is 9223372036854775807"),
        (with("N", i64::from(u32::MAX)), 128, None, 32, "the weights of MatMulNBits have the shape [128]"),
        (with("bits", 2), 64, None, 23, "with 2 bits needs ONNX Runtime 1.24 or newer; this one is 1.23"),
        (good, 127, None, 32, "the weights of MatMulNBits have the shape [127], expected 128 elements"),
        (with("K", 65), 192, None, 32, "the scales of MatMulNBits have the shape [8], expected 12"),
        (good, 128, Some((6, 4)), 32, "zero points of MatMulNBits are int32, expected uint8 or floats"),
        (good, 128, Some((2, 3)), 32, "zero points of MatMulNBits have the shape [3], expected 4"),
    ] {
        let error = check(&attributes, weights, zeros, runtime).expect_err(words);
        assert!(error.contains(words) && error.contains("the product"), "{words}: {error}");
    }
}

#[test]
fn a_file_of_tiny_entries_cannot_ask_for_memory() {
    // Nodes of 6 bytes in the file are some hundred in memory.
    let tiny = new().bytes(4, "a").0;
    let mut graph = new();
    for _ in 0..1_100_000 {
        graph.0.extend([0x0a, tiny.len() as u8]);
        graph.0.extend(&tiny);
    }
    refused(&model(&graph), "more than 2097152 nodes");
}

#[test]
fn a_missing_or_odd_path_is_named() {
    let error = Summary::read(Path::new("/no/such/model.onnx")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("/no/such/model.onnx"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    assert!(Summary::read(folder.path()).unwrap_err().to_string().contains("not a file"));
}
