//! Writes a checkpoint as ONNX: `cargo run --release --example export_onnx -- CHECKPOINT FOLDER [portable|fast] [bits8]`.

use std::process::ExitCode;

use ternion::formats::Checkpoint;
use ternion::formats::onnx::{Head, Options, Variant, export};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (from, to, rest) = match words.as_slice() {
        [from, to, rest @ ..] => (*from, *to, rest),
        _ => {
            eprintln!("usage: export_onnx CHECKPOINT FOLDER [portable|fast] [bits8]");
            return ExitCode::from(2);
        }
    };
    let variant = if rest.contains(&"fast") { Variant::Fast } else { Variant::Portable };
    let head = if rest.contains(&"bits8") { Head::Bits8 } else { Head::Full };
    let options = Options::new(variant).with_head(head);
    let exported =
        Checkpoint::open(from).and_then(|checkpoint| export(&checkpoint, to, &options, &mut |_, _| {}));
    if let Err(error) = exported {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    println!("written to {to}");
    ExitCode::SUCCESS
}
