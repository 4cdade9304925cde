//! Ten thousand requests over two hundred swaps: none is lost, none is answered by anything but a whole model, and what
//! the models took is given back.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod host;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use host::{Counted, answer, config, say};
use ternion::{
    Completion, FinishReason, GenerateRequest, LlmBackend,
    config::Config,
    models::{ModelEvent, ModelHandle, Models},
};

/// At least.
const REQUESTS: usize = 10_000;
const SWAPS: usize = 200;
const CLIENTS: usize = 12;
const PROMPTS: [&str; 3] = ["one", "How many days", "a b c d e f"];

/// The three models that take turns under one name: a checkpoint, an echo, another checkpoint.
fn turns() -> [Config; 3] {
    let model = |of: &str, more: &str| {
        config(&format!(
            "[models.chat]\nbackend = \"counted\"\ncontext_length = 64\nmax_sequences = {CLIENTS}\n\
             options.of = \"{of}\"\n{more}"
        ))
    };
    let checkpoint = |path: &str| model("candle", &format!("path = 'FIXTURES/{path}'\nthreads = 1\n"));
    [
        checkpoint("nano-packed"),
        model("echo", "options.delay_ms = 2\n"),
        checkpoint("1bitllm/model.safetensors"),
    ]
}

fn request(prompt: usize) -> GenerateRequest {
    let mut request = say(PROMPTS[prompt]).with_max_tokens(3);
    request.params.ignore_eos = true;
    request
}

/// What makes an answer to one of the prompts that of one model and no other.
type Essence = (usize, Vec<u32>, String, String);

fn essence(prompt: usize, answer: &Completion) -> Essence {
    (prompt, answer.tokens.clone(), answer.text.clone(), host::served_by(answer))
}

/// Resident bytes of this process; `None` where the system does not tell.
fn resident() -> Option<usize> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
    pages.split_whitespace().nth(1)?.parse::<usize>().ok().map(|pages| pages * 4096)
}

/// What the clients and the one who swaps know of each other.
struct Traffic {
    handle: ModelHandle,
    /// Which model says what.
    expected: BTreeMap<Essence, usize>,
    sent: AtomicUsize,
    swaps: AtomicUsize,
    over: AtomicBool,
}

/// What one client got.
#[derive(Default)]
struct Served {
    by_model: [usize; 3],
    /// Answers during which a swap happened.
    across: usize,
}

/// Asks until there were enough swaps and enough requests.
async fn client(traffic: Arc<Traffic>) -> Served {
    let mut served = Served::default();
    loop {
        let number = traffic.sent.fetch_add(1, Ordering::SeqCst);
        if number >= REQUESTS && traffic.over.load(Ordering::SeqCst) {
            return served;
        }
        let prompt = number % PROMPTS.len();
        let before = traffic.swaps.load(Ordering::SeqCst);
        let answer = answer(&traffic.handle, request(prompt)).await.unwrap();
        served.across += usize::from(traffic.swaps.load(Ordering::SeqCst) != before);
        let ended = matches!(answer.finish_reason, FinishReason::MaxTokens | FinishReason::EndOfSequence);
        assert!(ended, "{answer:?}");
        let model = traffic.expected.get(&essence(prompt, &answer));
        served.by_model[*model.unwrap_or_else(|| panic!("no model says that: {answer:?}"))] += 1;
    }
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

    // What each model says when it is alone.
    let mut expected = BTreeMap::new();
    for (turn, config) in turns.iter().enumerate() {
        models.reload_with(config.clone()).await.unwrap();
        for prompt in 0..PROMPTS.len() {
            let alone = answer(&handle, request(prompt)).await.unwrap();
            let other = expected.insert(essence(prompt, &alone), turn);
            assert_eq!(other, None, "the models cannot be told apart: {alone:?}");
        }
    }
    let loads_before = counted.loads.load(Ordering::SeqCst);
    let mut events = models.events();
    let told = tokio::spawn(async move {
        let (mut swapped, mut unloaded) = (0, 0);
        while let Ok(event) = events.recv().await {
            match event {
                ModelEvent::Swapped { .. } => swapped += 1,
                ModelEvent::Unloaded { .. } => unloaded += 1,
                other => panic!("{other}"),
            }
        }
        (swapped, unloaded)
    });

    let traffic = Arc::new(Traffic {
        handle,
        expected,
        sent: AtomicUsize::new(0),
        swaps: AtomicUsize::new(0),
        over: AtomicBool::new(false),
    });
    let clients: Vec<_> = (0..CLIENTS).map(|_| tokio::spawn(client(Arc::clone(&traffic)))).collect();
    let mut warm = None;
    for swap in 0..SWAPS {
        models.reload_with(turns[swap % turns.len()].clone()).await.unwrap();
        traffic.swaps.fetch_add(1, Ordering::SeqCst);
        // The swaps are spread over the requests.
        while traffic.sent.load(Ordering::SeqCst) < swap * REQUESTS / SWAPS {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if swap == 20 {
            warm = resident();
        }
    }
    traffic.over.store(true, Ordering::SeqCst);
    let mut all = Served::default();
    for client in clients {
        let served = client.await.unwrap();
        all.by_model.iter_mut().zip(served.by_model).for_each(|(all, own)| *all += own);
        all.across += served.across;
    }
    let took = began.elapsed().as_secs_f64();
    println!("{took:.1} s; answers of each model {:?}, {} across a swap", all.by_model, all.across);

    let answered: usize = all.by_model.iter().sum();
    assert_eq!(answered, traffic.sent.load(Ordering::SeqCst) - CLIENTS, "none is lost");
    assert!(answered >= REQUESTS);
    assert!(all.by_model.iter().all(|&n| n > REQUESTS / 50), "each model had its part: {:?}", all.by_model);
    assert!(all.across > SWAPS, "swaps under load: {}", all.across);
    assert_eq!(counted.loads.load(Ordering::SeqCst), loads_before + SWAPS);
    assert_eq!(counted.alive.load(Ordering::SeqCst), 1, "what has been swapped is gone");
    let most = counted.most_alive.load(Ordering::SeqCst);
    assert!(most <= 6, "old models pile up: {most}");
    if let (Some(warm), Some(now)) = (warm, resident()) {
        println!("{} MB resident after 21 swaps, {} MB after {SWAPS}", warm >> 20, now >> 20);
        // The checkpoints that were loaded meanwhile have more than 100 MB together, without their caches. What does grow is
        // what the tokenizers' library keeps for each tokenizer in each thread, until the thread ends.
        assert!(now < warm + (40 << 20), "{} MB became {} MB", warm >> 20, now >> 20);
    }

    let gone = traffic.handle.unloaded();
    drop((models, traffic));
    gone.await;
    assert_eq!(counted.alive.load(Ordering::SeqCst), 0);
    let (swapped, unloaded) = told.await.unwrap();
    // Before the events were counted, one model was there already.
    assert_eq!((swapped, unloaded), (SWAPS, SWAPS + 1));
}
