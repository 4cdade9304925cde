//! Ten thousand requests over two hundred swaps: none is lost, none is answered by anything but a whole model, and what
//! the models took is given back.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use host::{Counted, answer, config, say};
use ternion::{
    Completion, FinishReason, LlmBackend, config::Config, models::{ModelEvent, ModelHandle, Models},
};

const REQUESTS: usize = 10_000;
const SWAPS: usize = 200;
const CLIENTS: usize = 12;
const PROMPTS: [&str; 3] = ["one", "How many days", "a b c d e f"];

/// The three models that take turns: two checkpoints and an echo, all under one name.
fn turns() -> [Config; 3] {
    let model = |backend: &str, path: &str| {
        config(&format!(
            "[models.chat]\nbackend = \"counted\"\n{path}context = 64\nmax_sequences = {CLIENTS}\n\
             options = {{ of = \"{backend}\" }}\n"
        ))
    };
    let small = |name: &str| format!("path = 'FIXTURES/{name}'\nthreads = 1\n");
    [
        model("candle", &small("nano-packed")),
        model("echo", ""),
        model("candle", &small("1bitllm/model.safetensors")),
    ]
}

fn request(prompt: usize) -> ternion::GenerateRequest {
    let mut request = say(PROMPTS[prompt]).with_max_tokens(3);
    request.ignore_eos = true;
    request
}

/// What makes an answer that of one model and no other.
fn essence(answer: &Completion) -> (Vec<u32>, String, String) {
    (answer.tokens.clone(), answer.text.clone(), host::served_by(answer))
}

/// Resident bytes of this process; `None` where the system does not tell.
fn resident() -> Option<usize> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
    pages.split_whitespace().nth(1)?.parse::<usize>().ok().map(|pages| pages * 4096)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_over_two_hundred_swaps() {
    let began = Instant::now();
    let turns = turns();
    let counted = Counted::default();
    let mut registry = ternion::registry();
    registry.register(counted.clone());
    let models = Models::with_registry(turns[0].clone(), registry).unwrap();
    let handle = models.get("chat").await.unwrap();

    // What each model says alone.
    let mut expected: BTreeMap<_, usize> = BTreeMap::new();
    for (turn, config) in turns.iter().enumerate() {
        models.reload_with(config.clone()).await.unwrap();
        for prompt in 0..PROMPTS.len() {
            let answer = answer(&handle, request(prompt)).await.unwrap();
            let other = expected.insert((prompt, essence(&answer)), turn);
            assert_eq!(other, None, "the models can be told apart");
        }
    }
    let expected = Arc::new(expected);
    let mut events = models.events();
    let unloaded = tokio::spawn(async move {
        let mut unloaded = 0;
        let mut swapped = 0;
        loop {
            match events.recv().await {
                Ok(ModelEvent::Unloaded { .. }) => unloaded += 1,
                Ok(ModelEvent::Swapped { .. }) => swapped += 1,
                Ok(other) => panic!("{other:?}"),
                Err(_) => return (swapped, unloaded),
            }
        }
    });

    let sent = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| tokio::spawn(client(handle.clone(), Arc::clone(&expected), Arc::clone(&sent))))
        .collect();
    let mut warm = None;
    for swap in 0..SWAPS {
        models.reload_with(turns[swap % turns.len()].clone()).await.unwrap();
        // The swaps are spread over the requests.
        while sent.load(Ordering::Relaxed) < (swap + 1) * REQUESTS / (SWAPS + 1) {
            tokio::task::yield_now().await;
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        if swap == 20 {
            warm = resident();
        }
    }
    let mut served = [0; 3];
    for client in clients {
        for (total, own) in served.iter_mut().zip(client.await.unwrap()) {
            *total += own;
        }
    }
    assert_eq!(served.iter().sum::<usize>(), REQUESTS, "every request was answered: {served:?}");
    assert!(served.iter().all(|&n| n > REQUESTS / 20), "each model had its part: {served:?}");
    assert_eq!(counted.loads.load(Ordering::SeqCst), SWAPS + turns.len());
    assert!(counted.most_alive.load(Ordering::SeqCst) < 12, "old models do not pile up");
    assert_eq!(counted.alive.load(Ordering::SeqCst), 1, "what has been swapped is gone");
    let last = handle.unloaded();
    if let (Some(warm), Some(now)) = (warm, resident()) {
        // Without giving back, 120 more checkpoints of a megabyte and more would be here.
        assert!(now < warm + (48 << 20), "{} MB became {} MB", warm >> 20, now >> 20);
        println!("{} MB after 21 swaps, {} MB after {SWAPS}", warm >> 20, now >> 20);
    }
    drop((models, handle));
    last.await;
    assert_eq!(counted.alive.load(Ordering::SeqCst), 0);
    let (swapped, unloaded) = unloaded.await.unwrap();
    assert_eq!(swapped, SWAPS);
    assert!(unloaded > SWAPS, "each swap gave up a model, and so did the end: {unloaded}");
    println!("answered by each model: {served:?}, in {:.1} s", began.elapsed().as_secs_f64());
}

/// Sends requests until enough are sent; how many each model has answered.
async fn client(
    handle: ModelHandle,
    expected: Arc<BTreeMap<(usize, (Vec<u32>, String, String)), usize>>,
    sent: Arc<AtomicUsize>,
) -> [usize; 3] {
    let mut served = [0; 3];
    loop {
        let number = sent.fetch_add(1, Ordering::Relaxed);
        if number >= REQUESTS {
            return served;
        }
        let prompt = number % PROMPTS.len();
        let answer = answer(&handle, request(prompt)).await.unwrap();
        assert!(
            matches!(answer.finish_reason, FinishReason::MaxTokens | FinishReason::EndOfSequence),
            "{answer:?}"
        );
        let key = (prompt, essence(&answer));
        let turn = expected.get(&key).unwrap_or_else(|| panic!("no model says that: {answer:?}"));
        served[*turn] += 1;
    }
}
