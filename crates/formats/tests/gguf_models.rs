//! What GGUF files of other writers leave unsaid: activation, end-of-turn tokens, pre-tokenizer, chat template, copies.
#![allow(clippy::unwrap_used, reason = "a failure in a helper fails its test, as it should")]

mod common;

use common::gguf::Raw;
use proptest::prelude::*;
use ternion_core::Message;
use ternion_core::text::Tokenizer;
use ternion_formats::convert::Target;
use ternion_formats::gguf::{self, Array, Value, Writer};
use ternion_formats::{Activation, Checkpoint, Family, RopeScaling, SharedBytes, Weights};

const LLAMA3_TEMPLATE: &str =
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] }}{% endfor %}";

/// A file as bitnet.cpp's converter writes it: no pre-tokenizer, one end token, Llama 3's chat template.
fn official() -> Raw {
    let mut raw = Raw::fixture("nano-packed", Target::GgufI2s);
    for key in [
        "ternion.version",
        "ternion.eos_token_ids",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.eot_token_id",
        "bitnet-b1.58.hidden_activation",
        "bitnet-b1.58.rope.scaling.type",
    ] {
        raw.remove(key);
    }
    raw.set("tokenizer.ggml.eos_token_id", 305u32);
    raw.set("tokenizer.chat_template", LLAMA3_TEMPLATE);
    raw
}

#[test]
fn the_official_file_is_put_right() {
    let checkpoint = official().open().unwrap();
    let original = Checkpoint::open(common::fixture("nano-packed")).unwrap();
    assert_eq!((checkpoint.spec.family, checkpoint.spec.activation), (Family::BitNet, Activation::Relu2));
    assert_eq!((checkpoint.spec.bos, &checkpoint.spec.eos[..]), (Some(304), &[305, 313][..]));
    let (ours, theirs) = (checkpoint.tokenizer().unwrap(), original.tokenizer().unwrap());
    let messages = [Message::new("user", "How many days are in a week? 1234")];
    assert_eq!(ours.encode_chat(&messages, true).unwrap(), theirs.encode_chat(&messages, true).unwrap());

    // A template of somebody's own stays, and so does one that Ternion wrote.
    for change in
        [(|raw: &mut Raw| raw.set("tokenizer.chat_template", "{{ 'mine' }}")) as fn(&mut Raw), |raw| {
            raw.set("tokenizer.chat_template", "{{ 'mine' }}{# <|start_header_id|> #}");
            raw.set("ternion.version", "0.1.0");
        }]
    {
        let mut raw = official();
        change(&mut raw);
        let tokenizer = raw.open().unwrap().tokenizer().unwrap();
        assert_eq!(tokenizer.render_chat(&messages, true).unwrap(), "mine");
    }
}

#[test]
fn the_file_says_which_activation() {
    let rename = |raw: &mut Raw, to: &str| {
        for (key, _, _) in &mut raw.pairs {
            let text = String::from_utf8(key.clone()).unwrap();
            *key = text.replace("bitnet-b1.58.", &format!("{to}.")).into_bytes();
        }
        raw.set("general.architecture", to);
    };
    for (architecture, said, expected) in [
        ("bitnet-b1.58", None, Activation::Relu2),
        ("bitnet-25", None, Activation::Relu2),
        ("bitnet", None, Activation::Relu2),
        ("bitnet", Some("silu"), Activation::Silu),
        ("bitnet", Some("relu2"), Activation::Relu2),
        ("bitnet-b1.58", Some("silu"), Activation::Silu),
    ] {
        let mut raw = official();
        rename(&mut raw, architecture);
        if let Some(said) = said {
            raw.set(&format!("{architecture}.hidden_activation"), said);
        }
        let spec = raw.open().unwrap().spec;
        assert_eq!((spec.activation, spec.sub_norms), (expected, true), "{architecture} {said:?}");
        assert_eq!(spec.family == Family::OneBitLlm, expected == Activation::Silu);
    }
}

#[test]
fn a_copy_of_the_embedding_is_no_head() {
    let mut raw = official();
    let (dims, kind, data) = {
        let embed = raw.tensor("token_embd.weight");
        (embed.dims.clone(), embed.kind, embed.data.clone())
    };
    raw.add("output.weight", &dims, kind, data);
    let checkpoint = raw.open().unwrap();
    assert!(checkpoint.head.is_none() && checkpoint.spec.tied);
    raw.tensor("output.weight").data[0] ^= 1;
    let checkpoint = raw.open().unwrap();
    assert!(checkpoint.head.is_some() && !checkpoint.spec.tied);
}

#[test]
fn codes_stay_in_the_mapped_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, official().bytes()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.embed.is_mapped());
    assert!(
        checkpoint
            .layers
            .iter()
            .flat_map(ternion_formats::LayerTensors::linears)
            .all(ternion_formats::Linear::is_mapped)
    );
    let tokenizer = Tokenizer::from_parts(Checkpoint::tokenizer_parts_at(&path).unwrap()).unwrap();
    assert_eq!(tokenizer.token_id("<|eot_id|>"), Some(313));
}

#[test]
fn rotary_factors_divide_the_frequencies() {
    let mut raw = Raw::fixture("llama-ternary", Target::GgufTq2);
    let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
    raw.add("rope_freqs.weight", &[32], 0, factors.iter().flat_map(|x| x.to_le_bytes()).collect());
    let rope = raw.open().unwrap().spec.rope;
    assert_eq!(rope.scaling, RopeScaling::Factors(factors.clone()));
    let mut plain = rope.clone();
    plain.scaling = RopeScaling::None;
    let (scaled, plain) = (rope.frequencies(64), plain.frequencies(64));
    assert!((0..32).all(|i| scaled[i] == plain[i] / factors[i]));
    raw.tensor("rope_freqs.weight").data[..4].copy_from_slice(&0f32.to_le_bytes());
    assert!(raw.open_error().to_string().contains("expected positive numbers"));
}

#[test]
fn dense_projections_are_read_in_the_models_order() {
    // Rows that say where they belong: halves of a head are interleaved in files of the Llama architecture.
    let mut raw = Raw::fixture("llama-ternary", Target::GgufTq2);
    let row = |name: usize| std::iter::repeat_n(name as f32, 256);
    let data = (0..256).flat_map(|in_file: usize| {
        let (head, at) = (in_file / 64, in_file % 64);
        row(head * 64 + at % 2 * 32 + at / 2).flat_map(f32::to_le_bytes)
    });
    let data: Vec<u8> = data.collect();
    raw.tensors.retain(|t| t.name != b"blk.0.attn_q.scale");
    let q = raw.tensor("blk.0.attn_q.weight");
    (q.kind, q.data) = (0, data);
    let checkpoint = raw.open().unwrap();
    let Weights::Dense(q) = &checkpoint.layers[0].q.weights else { panic!("ternary") };
    assert_eq!(q.to_f32(), (0..256).flat_map(row).collect::<Vec<_>>());
    assert_eq!(checkpoint.spec.quantization.unwrap().keep_dense, ["model.layers.0.self_attn.q_proj"]);
}

/// A SentencePiece vocabulary as GGUF metadata.
fn pieces(list: &[(&str, f32, i32)]) -> Tokenizer {
    let mut writer = Writer::new();
    writer.set("general.architecture", "bitnet");
    writer.set("tokenizer.ggml.model", "llama");
    writer.set("tokenizer.ggml.tokens", Array::strings(list.iter().map(|p| p.0)));
    writer.set("tokenizer.ggml.scores", Array::f32s(&list.iter().map(|p| p.1).collect::<Vec<_>>()));
    writer.set("tokenizer.ggml.token_type", Array::i32s(&list.iter().map(|p| p.2).collect::<Vec<_>>()));
    writer.set("tokenizer.ggml.bos_token_id", 1u32);
    writer.set("tokenizer.ggml.eos_token_id", 2u32);
    writer.set("tokenizer.ggml.unknown_token_id", 0u32);
    let bytes = writer.begin(Vec::new()).unwrap().finish().unwrap();
    let file = gguf::File::parse(&SharedBytes::from(bytes), "pieces").unwrap();
    Tokenizer::from_parts(gguf::tokenizer_parts(&file).unwrap()).unwrap()
}

const PIECES: [(&str, f32, i32); 22] = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<0x0A>", 0.0, 6),
    ("<0xC3>", 0.0, 6),
    ("<0xA9>", 0.0, 6),
    ("\u{2581}", -30.0, 1),
    ("a", -31.0, 1),
    ("b", -32.0, 1),
    ("c", -33.0, 1),
    ("ab", -1.0, 1),
    ("bc", -2.0, 1),
    ("ca", -3.0, 1),
    ("abc", -4.0, 1),
    ("\u{2581}a", -5.0, 1),
    ("\u{2581}ab", -6.0, 1),
    ("bca", -7.0, 1),
    ("\u{2581}abc", -8.0, 1),
    ("cab", -9.0, 1),
    ("aa", -10.0, 1),
    ("\u{2581}\u{2581}", -11.0, 1),
    ("abab", -12.0, 1),
];

/// SentencePiece's algorithm: join the neighbours whose union has the best score, the leftmost of equals, until none is left.
fn join(text: &str) -> Vec<u32> {
    let score =
        |piece: &str| PIECES.iter().position(|p| p.0 == piece && p.2 == 1).map(|id| (PIECES[id].1, id));
    let mut parts: Vec<String> =
        format!(" {text}").replace(' ', "\u{2581}").chars().map(String::from).collect();
    loop {
        let unions =
            (1..parts.len()).filter_map(|i| Some((score(&format!("{}{}", parts[i - 1], parts[i]))?.0, i)));
        let best = unions.fold(None, |best: Option<(f32, usize)>, union| match best {
            Some(best) if best.0 >= union.0 => Some(best),
            _ => Some(union),
        });
        let Some((_, at)) = best else { break };
        let right = parts.remove(at);
        parts[at - 1].push_str(&right);
    }
    parts.iter().map(|part| score(part).unwrap().1 as u32).collect()
}

#[test]
fn sentence_pieces_have_bytes_and_special_tokens() {
    let tokenizer = pieces(&PIECES);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    assert_eq!(tokenizer.encode("abc", true).unwrap(), [1, 17]);
    let ids = tokenizer.encode("a\né", false).unwrap();
    assert_eq!(ids, [14, 3, 4, 5]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a\né");
    assert_eq!(tokenizer.encode("</s>", false).unwrap(), [2]);
    assert!(tokenizer.encode_plain("ab</s>").unwrap().iter().all(|&id| id != 2), "as text it is none");
}

proptest! {
    #[test]
    fn sentence_pieces_are_joined_by_score(text in "[abc ]{1,40}") {
        prop_assert_eq!(pieces(&PIECES).encode(&text, false).unwrap(), join(&text));
    }

    /// Whatever is written is read as it was.
    #[test]
    fn metadata_comes_back(
        strings in prop::collection::vec(".{0,20}", 0..20),
        integers in prop::collection::vec(any::<i32>(), 0..20),
        number in any::<f32>().prop_filter("NaN differs from itself", |x| !x.is_nan()),
        flag in any::<bool>(),
        rows in 1u64..5,
    ) {
        let mut writer = Writer::new();
        let pairs: [(&str, Value); 5] = [
            ("strings", Array::strings(strings.iter().map(String::as_str)).into()),
            ("integers", Array::i32s(&integers).into()),
            ("number", number.into()),
            ("flag", flag.into()),
            ("text", strings.concat().into()),
        ];
        for (key, value) in &pairs {
            writer.set(*key, value.clone());
        }
        writer.tensor("t", gguf::TensorType::Q8_0, &[64, rows]).unwrap();
        prop_assert!(writer.tensor("t", gguf::TensorType::F32, &[1]).is_err(), "the name is taken");
        prop_assert!(writer.tensor("u", gguf::TensorType::Q8_0, &[65]).is_err(), "no whole block");
        let mut out = writer.begin(Vec::new()).unwrap();
        out.tensor("t", |out| out.write_all(&vec![7; 68 * rows as usize])).unwrap();
        let bytes = out.finish().unwrap();
        let file = gguf::File::parse(&SharedBytes::from(bytes), "x").unwrap();
        for (key, value) in &pairs {
            prop_assert_eq!(file.value(key), Some(value));
        }
        prop_assert_eq!(&*file.data(file.tensor("t").unwrap()), &vec![7u8; 68 * rows as usize][..]);
    }
}
