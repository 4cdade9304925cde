//! Accuracy on held-out items, through the inference engine: what a user of the checkpoint will see.

use std::error::Error;
use std::fmt;
use std::path::Path;

use ternion::{GenerateRequest, LlmBackend, LogitsRequest, Message, Sampling};

use super::text::{Random, Split, arithmetic, chat, facts};

/// Examples before a question.
const SHOTS: usize = 5;

/// Right answers of so many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Accuracy {
    pub(crate) right: usize,
    pub(crate) of: usize,
}

impl Accuracy {
    fn add(&mut self, right: bool) {
        self.right += usize::from(right);
        self.of += 1;
    }

    /// The share, and the ends of its 95 % interval (Wilson).
    pub(crate) fn interval(&self) -> (f64, f64, f64) {
        let (n, z) = (self.of as f64, 1.96f64);
        let p = self.right as f64 / n;
        let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        (p, middle - half, middle + half)
    }
}

impl fmt::Display for Accuracy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (p, low, high) = self.interval();
        write!(
            f,
            "{:.1} % ({:.1} to {:.1}, {} of {})",
            100.0 * p,
            100.0 * low,
            100.0 * high,
            self.right,
            self.of
        )
    }
}

/// Accuracies by kind, `count` items each.
pub(crate) async fn held_out(folder: &Path, count: usize) -> Result<Vec<(String, Accuracy)>, Box<dyn Error>> {
    let model = ternion::open(folder).await?;
    let mut random = Random::new(0, 1 << 40);
    let mut all = vec![("word problems".to_owned(), problems(&*model, &mut random, count).await?)];
    for subject in facts::SUBJECTS {
        all.push((subject.replace('_', " "), choices(&*model, &mut random, subject, count).await?));
    }
    all.push(("chat".to_owned(), talk(&*model, &mut random, count).await?));
    Ok(all)
}

async fn answer(model: &dyn LlmBackend, request: GenerateRequest) -> Result<String, Box<dyn Error>> {
    let request = request.with_sampling(Sampling::greedy()).with_max_tokens(120);
    Ok(model.generate(request).await?.collect().await?.text)
}

async fn problems(
    model: &dyn LlmBackend,
    random: &mut Random,
    count: usize,
) -> Result<Accuracy, Box<dyn Error>> {
    let mut shots = String::new();
    for _ in 0..SHOTS {
        let shot = arithmetic::problem(random, Split::Train);
        shots += &format!("Question: {}\nAnswer: {}\n\n", shot.question, shot.answer);
    }
    let mut accuracy = Accuracy::default();
    for _ in 0..count {
        let item = arithmetic::problem(random, Split::HeldOut);
        let prompt = format!("{shots}Question: {}\nAnswer:", item.question);
        let text = answer(model, GenerateRequest::new(prompt).with_stop(["Question:"])).await?;
        let result = |text: &str| text.split_once("#### ").map(|(_, result)| result.trim().to_owned());
        accuracy.add(result(&text).is_some() && result(&text) == result(&item.answer));
    }
    Ok(accuracy)
}

async fn choices(
    model: &dyn LlmBackend,
    random: &mut Random,
    subject: &'static str,
    count: usize,
) -> Result<Accuracy, Box<dyn Error>> {
    let tokenizer = model.tokenizer().ok_or("the model has no tokenizer")?;
    let mut shots = facts::description(subject);
    for _ in 0..SHOTS {
        let shot = facts::choice(random, Split::Train, Some(subject));
        shots += &format!("{} {}\n\n", shot.prompt(), shot.letter());
    }
    let letters = ['A', 'B', 'C', 'D'].map(|letter| tokenizer.encode(&format!(" {letter}"), false));
    let mut accuracy = Accuracy::default();
    for _ in 0..count {
        let item = facts::choice(random, Split::HeldOut, Some(subject));
        let tokens = tokenizer.encode(&(shots.clone() + &item.prompt()), true)?;
        let last = tokens.len() - 1;
        let logits = model.logits(LogitsRequest::new(tokens).with_start(last)).await?;
        let mut best = (f32::NEG_INFINITY, 0);
        for (index, letter) in letters.iter().enumerate() {
            let letter = letter.as_ref().map_err(ToString::to_string)?;
            let [id] = letter[..] else { return Err("a letter is more than one token".into()) };
            if logits[id as usize] > best.0 {
                best = (logits[id as usize], index);
            }
        }
        accuracy.add(best.1 == item.answer);
    }
    Ok(accuracy)
}

async fn talk(model: &dyn LlmBackend, random: &mut Random, count: usize) -> Result<Accuracy, Box<dyn Error>> {
    let mut accuracy = Accuracy::default();
    for _ in 0..count {
        let item = chat::exchange(random, Split::HeldOut);
        let text = answer(model, GenerateRequest::chat([Message::user(item.question)])).await?;
        accuracy.add(text == item.answer);
    }
    Ok(accuracy)
}
