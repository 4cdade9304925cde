//! A child of fork(2) has no engine thread: its requests fail, and those of the parent go on.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::time::Duration;

use common::{Toy, VOCAB, greedy, tokens};
use ternion_core::{ErrorKind, GenerateRequest, GenerateStream, LlmBackend, ScoreRequest};
use ternion_engine::Engine;

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
}

fn endless(count: usize) -> GenerateRequest {
    let mut request = tokens(&[300, 301, 302]).with_max_tokens(count);
    request.params.ignore_eos = true;
    request
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What the child does; the number of the first check that fails, or 0.
fn child(engine: &Engine, mut stream: GenerateStream) -> i32 {
    let closed = |error: ternion_core::Error| {
        error.kind() == ErrorKind::Closed && error.to_string().contains("load it after the fork")
    };
    runtime().block_on(async {
        let all = async {
            if !engine.is_closed() {
                return 1;
            }
            if !engine.generate(endless(3)).await.is_err_and(closed) {
                return 2;
            }
            if !engine.score(ScoreRequest::new(vec![1, 2], 1)).await.is_err_and(closed) {
                return 3;
            }
            // Of a stream that the parent has begun, the child gets an end.
            while let Some(event) = stream.next().await {
                if let Err(error) = event {
                    return if closed(error) { 0 } else { 4 };
                }
            }
            5
        };
        let status = tokio::time::timeout(Duration::from_secs(10), all).await.unwrap_or(6);
        if status == 0 && tokio::time::timeout(Duration::from_secs(10), engine.unloaded()).await.is_err() {
            return 7;
        }
        status
    })
}

#[test]
fn a_forked_child_gets_an_error() {
    let mut toy = Toy::new(VOCAB);
    toy.context = 10_000;
    toy.delay = Duration::from_millis(1);
    let engine = toy.start();
    let parent = runtime();
    let stream = parent.block_on(engine.generate(endless(5000))).unwrap();
    // SAFETY: The child runs a few requests and ends with `_exit`, without the parent's destructors.
    let pid = unsafe { fork() };
    assert!(pid >= 0, "no process could be made");
    if pid == 0 {
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| child(&engine, stream)));
        // SAFETY: It ends this process, which nothing else uses.
        unsafe { _exit(status.unwrap_or(8)) }
    }
    let mut status = -1;
    // SAFETY: `status` lives as long as the call, and `pid` is a child that nothing else waits for.
    assert_eq!(unsafe { waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status >> 8, 0, "the check of the child with this number failed");
    drop(stream);
    assert!(!engine.is_closed());
    let answer =
        parent.block_on(async { engine.generate(endless(4)).await.unwrap().collect().await.unwrap() });
    assert_eq!(answer.tokens, greedy(&[300, 301, 302], 4));
}
