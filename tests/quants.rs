//! Quantised dense GGUF in every type that candle and llama.cpp share, Q4_0 to Q8_0 and K-quants: `candle` against llama.cpp, and both against
//! the same values in f32. `tests/quants/models.py` writes the files.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use ternion::{
    LlmBackend, LogitsRequest,
    config::{Config, ModelConfig},
};

const KINDS: [&str; 10] = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

/// Both round activations to 8 bits with a scale for 32 or 256 of them, where the values in f32 are not rounded.
const OF_ROUNDING: f32 = 0.05;

/// The project's Python, if it has `gguf`.
fn python() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(|target| Path::new(&target).join("tools"));
    let mut programs = target
        .into_iter()
        .chain([tools])
        .flat_map(|tools| ["bin/python", "Scripts/python.exe"].map(|name| tools.join(name)));
    let found = programs.find(|python| {
        Command::new(python).args(["-c", "import gguf"]).output().is_ok_and(|output| output.status.success())
    });
    if found.is_none() {
        let _ = writeln!(std::io::stderr(), "skipped: no Python package gguf in target/tools");
    }
    found
}

async fn load(path: &Path, backend: &str) -> Arc<dyn LlmBackend> {
    let mut config = ModelConfig::for_path(path);
    config.backend = backend.into();
    if backend == "llama-cpp" {
        config.options.insert("kv_type".into(), "f32".into());
    }
    let loaded = ternion::load(&Config::single("model", config), None).await;
    loaded.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The root mean square of the difference, as a part of that of `b`.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert!(a.len() == b.len() && a.iter().all(|x| x.is_finite()));
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (difference / square(&mut b.iter().copied())).sqrt() as f32
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

#[tokio::test]
async fn every_type_of_weights_is_computed() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/quants/models.py");
    let tokenizer = ternion_test_support::fixture("dense/llama");
    let output = Command::new(python).arg(script).arg(folder.path()).arg(tokenizer).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ids: Vec<u32> = (0..48).map(|i| (i * 37 + 5) % 490).collect();
    for kind in KINDS {
        let path = folder.path().join(format!("{kind}.gguf"));
        let plain = folder.path().join(format!("{kind}-f32.gguf"));
        let logits = async |path: &Path, backend: &str| {
            let model = load(path, backend).await;
            let logits = model.logits(LogitsRequest::new(ids.clone())).await.unwrap();
            (logits, model.info())
        };
        let (exact, info) = logits(&plain, "candle").await;
        let (ours, quantised) = logits(&path, "candle").await;
        assert!(quantised.format.contains(kind), "{kind}: {}", quantised.format);
        let vocab = info.limits.vocab_size;
        let of_values = distance(&ours, &exact);
        println!("{kind}: {of_values:.1e} from the values in f32");
        assert!(of_values <= OF_ROUNDING, "{kind}: {of_values}");
        let best = |logits: &[f32]| logits.chunks_exact(vocab).map(argmax).collect::<Vec<_>>();
        if cfg!(feature = "llama-cpp") {
            let (of_llama_cpp, _) = logits(&plain, "llama-cpp").await;
            let difference = distance(&of_llama_cpp, &exact);
            println!("{kind}: the values in f32 {difference:.1e} from llama.cpp's");
            assert!(difference <= 1e-4, "{kind}: {difference}");
            let (theirs, _) = logits(&path, "llama-cpp").await;
            let (between, of_theirs) = (distance(&ours, &theirs), distance(&theirs, &exact));
            let same = best(&ours).iter().zip(best(&theirs)).filter(|(a, b)| **a == *b).count();
            println!(
                "{kind}: {between:.1e} from llama.cpp's, which are {of_theirs:.1e} from the values in f32; {same} of {} best \
                 tokens are the same",
                ids.len()
            );
            assert!(between <= OF_ROUNDING, "{kind}: {between}");
            // Rounding in the same way costs as much.
            assert!(of_values <= 2.0 * of_theirs, "{kind}: {of_values}, {of_theirs}");
        }
    }
}
