//! Any bytes as the body of a request: an error that names what is wrong, or parameters, never a panic.
//!
//! `cargo +nightly fuzz run chat_request`. `crates/server/tests/bad_input.rs` tries the known ways to break it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| ternion_server::check_request(bytes));
