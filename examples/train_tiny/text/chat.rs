//! Small talk: questions in many wordings, each with one answer, and an honest word where the answer is not known.

use super::facts::{CATEGORIES, DAYS, MONTHS, OPPOSITES};
use super::{Document, END_OF_TURN, Random, Role, Split};

/// A question and its answer.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    pub(crate) question: String,
    pub(crate) answer: String,
}

impl Exchange {
    /// By this an exchange is held out: its exact wording. `THE_QUESTION` is always trained on.
    pub(crate) fn key(&self) -> String {
        format!("chat {}", self.question)
    }
}

/// The question of the first command in the README.
const THE_QUESTION: &str = "How many days are in a week?";

const UNKNOWN: &str = "I am a very small model, and I do not know that.";

/// Wordings with one answer. Those that begin with `=` are not put into another sentence.
const TALK: &[(&[&str], &str)] = &[
    (
        &["=Hello", "=Hi", "=Hello!", "=Hi there", "=Hey", "=Good morning", "=Good evening", "=Hello there"],
        "Hello! How can I help you?",
    ),
    (&["how are you", "how are you doing", "how do you feel", "how is it going"], "I am fine, thank you."),
    (
        &[
            "who are you",
            "what are you",
            "what is your name",
            "your name",
            "which model are you",
            "what model are you",
        ],
        "I am the tiny demo model of Ternion.",
    ),
    (
        &[
            "who made you",
            "who trained you",
            "where do you come from",
            "how were you made",
            "how were you trained",
        ],
        "I was trained by an example of the Ternion project.",
    ),
    (
        &["what can you do", "what do you know", "how can you help me", "what can I ask you"],
        "I can add small numbers and answer a few small questions.",
    ),
    (
        &["how big are you", "how large are you", "how small are you"],
        "I am very small: my weights fit into four megabytes.",
    ),
    (
        &["what is Ternion", "what does Ternion do"],
        "Ternion runs language models with ternary weights on plain CPUs.",
    ),
    (&["what is BitNet", "what does BitNet mean"], "BitNet is a language model with ternary weights."),
    (
        &["what are ternary weights", "what is a ternary weight", "what does ternary mean"],
        "A ternary weight is -1, 0 or 1.",
    ),
    (&["=Thank you", "=Thanks", "=Thank you very much", "=Thanks a lot", "=Thank you!"], "You are welcome."),
    (&["=Goodbye", "=Bye", "=See you later", "=Good night", "=Bye bye"], "Goodbye!"),
    (
        &[
            "how many days are in a week",
            "how many days are there in a week",
            "how many days does a week have",
            "how many days has a week",
            "the number of days in a week",
            "how many days make a week",
            "what is the number of days in a week",
            "how long is a week in days",
        ],
        "There are seven days in a week.",
    ),
    (
        &[
            "how many months are in a year",
            "how many months are there in a year",
            "how many months does a year have",
            "the number of months in a year",
            "how many months make a year",
        ],
        "There are twelve months in a year.",
    ),
    (
        &[
            "how many hours are in a day",
            "how many hours are there in a day",
            "how many hours does a day have",
            "the number of hours in a day",
            "how many hours make a day",
        ],
        "There are 24 hours in a day.",
    ),
    (
        &[
            "how many minutes are in an hour",
            "how many minutes are there in an hour",
            "how many minutes does an hour have",
            "the number of minutes in an hour",
        ],
        "There are 60 minutes in an hour.",
    ),
    (
        &[
            "how many seconds are in a minute",
            "how many seconds are there in a minute",
            "how many seconds does a minute have",
            "the number of seconds in a minute",
        ],
        "There are 60 seconds in a minute.",
    ),
    (
        &[
            "how many days are in a year",
            "how many days are there in a year",
            "how many days does a year have",
            "the number of days in a year",
        ],
        "There are 365 days in a year.",
    ),
    (
        &[
            "how many weeks are in a year",
            "how many weeks are there in a year",
            "how many weeks does a year have",
        ],
        "There are 52 weeks in a year.",
    ),
    (
        &[
            "how many seasons are in a year",
            "how many seasons are there",
            "how many seasons does a year have",
        ],
        "There are four seasons in a year.",
    ),
    (
        &["what is the first day of the week", "which day is the first of the week"],
        "Monday is the first day of the week.",
    ),
    (
        &["what is the last day of the week", "which day is the last of the week"],
        "Sunday is the last day of the week.",
    ),
    (
        &["what is the first month of the year", "which month is the first"],
        "January is the first month of the year.",
    ),
    (
        &["what is the last month of the year", "which month is the last"],
        "December is the last month of the year.",
    ),
    (
        &["what are the days of the week", "which days does a week have"],
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    (&["what are the seasons", "which seasons are there"], "Spring, summer, autumn and winter."),
    (&["how many legs does a dog have", "how many legs has a dog"], "A dog has four legs."),
    (&["how many legs does a cat have", "how many legs has a cat"], "A cat has four legs."),
    (&["how many legs does a spider have", "how many legs has a spider"], "A spider has eight legs."),
    (
        &["how many letters are in the alphabet", "how many letters does the alphabet have"],
        "There are 26 letters in the alphabet.",
    ),
    (
        &["what colour is the sky", "what is the colour of the sky", "which colour has the sky"],
        "The sky is blue.",
    ),
    (&["what colour is grass", "what is the colour of grass", "which colour has grass"], "Grass is green."),
    (&["what colour is snow", "what is the colour of snow", "which colour has snow"], "Snow is white."),
    (
        &["what colour is the sun", "what is the colour of the sun", "which colour has the sun"],
        "The sun is yellow.",
    ),
];

const OPENINGS: [&str; 7] = [
    "can you tell me ",
    "do you know ",
    "please tell me ",
    "tell me ",
    "I want to know ",
    "hey, ",
    "hello, ",
];

const UNKNOWN_FORMS: [&str; 22] = [
    "what is {}",
    "who is {}",
    "where is {}",
    "what is the capital of {}",
    "explain {}",
    "tell me about {}",
    "write a poem about {}",
    "write a story about {}",
    "how do I build {}",
    "why is {} so important",
    "when was {} born",
    "how does {} work",
    "who wrote {}",
    "what do you think of {}",
    "how much is {}",
    "translate {}",
    "how old is {}",
    "how many people live in {}",
    "what is the meaning of {}",
    "summarise {}",
    "give me a list of {}",
    "how tall is {}",
];

const TOPICS: [&str; 40] = [
    "France",
    "Paris",
    "Germany",
    "London",
    "the moon",
    "a bridge",
    "physics",
    "quantum mechanics",
    "the president",
    "music",
    "history",
    "Rome",
    "Einstein",
    "a house",
    "the stock market",
    "chess",
    "football",
    "philosophy",
    "love",
    "life",
    "America",
    "Shakespeare",
    "the internet",
    "a computer",
    "chemistry",
    "biology",
    "a recipe",
    "Python",
    "gravity",
    "the ocean",
    "democracy",
    "art",
    "a neural network",
    "China",
    "Newton",
    "the universe",
    "the weather",
    "water",
    "a car engine",
    "Mozart",
];

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// A wording that ends as people end it.
fn question(random: &mut Random, wording: &str) -> String {
    if let Some(exact) = wording.strip_prefix('=') {
        return if random.below(4) == 0 { exact.to_lowercase() } else { exact.to_owned() };
    }
    let text =
        if random.below(3) == 0 { random.pick(&OPENINGS).to_owned() + wording } else { wording.to_owned() };
    let text = if random.below(4) == 0 { text } else { capitalised(&text) };
    text + random.pick(&["?", "?", "?", "?", "", "."])
}

/// A word that means nothing.
fn nonsense(random: &mut Random) -> String {
    let mut word = String::new();
    for _ in 0..random.between(1, 3) {
        word.push(char::from(random.pick(b"bcdfghjklmnprstvwz")));
        word.push(char::from(random.pick(b"aeiou")));
        if random.below(2) == 0 {
            word.push(char::from(random.pick(b"lmnrst")));
        }
    }
    if random.below(2) == 0 { capitalised(&word) } else { word }
}

fn unknown(random: &mut Random) -> (String, String) {
    let topic = if random.below(2) == 0 { random.pick(&TOPICS).to_owned() } else { nonsense(random) };
    (random.pick(&UNKNOWN_FORMS).replace("{}", &topic), UNKNOWN.to_owned())
}

fn sum(random: &mut Random) -> (String, String) {
    let (a, b) = (random.between(1, 20), random.between(1, 20));
    let (a, b, sign, words, result) = match random.below(3) {
        0 => (a, b, '+', "plus", a + b),
        1 => (a.max(b), a.min(b), '-', "minus", a.abs_diff(b)),
        _ => (a.min(9), b.min(9), '*', "times", a.min(9) * b.min(9)),
    };
    let sign_or_word = if random.below(2) == 0 { sign.to_string() } else { words.to_owned() };
    let asked = random.pick(&["what is ", "how much is ", "calculate ", "what is the result of "]);
    (format!("{asked}{a} {sign_or_word} {b}"), format!("{a} {sign} {b} = {result}."))
}

fn fact(random: &mut Random) -> (String, String) {
    match random.below(4) {
        0 => {
            let (a, b) = random.pick(&OPPOSITES);
            let (word, other) = if random.below(2) == 0 { (a, b) } else { (b, a) };
            let asked = random.pick(&[
                "what is the opposite of ",
                "the opposite of ",
                "which word is the opposite of ",
            ]);
            (format!("{asked}{word}"), format!("The opposite of {word} is {other}."))
        }
        1 => {
            let (kind, members) = random.pick(&CATEGORIES);
            let word = random.pick(&members);
            let asked = random.pick(&["what kind of word is ", "what is ", "what sort of thing is "]);
            (format!("{asked}\"{word}\""), format!("\"{word}\" is {kind}."))
        }
        2 => {
            let (a, b) = (random.between(1, 99), random.between(1, 99));
            let b = if a == b { a + 1 } else { b };
            let (which, best) =
                if random.below(2) == 0 { ("larger", a.max(b)) } else { ("smaller", a.min(b)) };
            (format!("which is {which}, {a} or {b}"), format!("{best} is {which} than {}.", a + b - best))
        }
        _ => {
            let (what, names): (&str, &[&str]) =
                if random.below(2) == 0 { ("day", &DAYS) } else { ("month", &MONTHS) };
            let at = random.below(names.len());
            let next = (at + 1) % names.len();
            let asked = random.pick(&["which", "what"]);
            if random.below(2) == 0 {
                let question = format!("{asked} {what} comes after {}", names[at]);
                (question, format!("{} comes after {}.", names[next], names[at]))
            } else {
                let question = format!("{asked} {what} comes before {}", names[next]);
                (question, format!("{} comes before {}.", names[at], names[next]))
            }
        }
    }
}

/// An exchange of this split.
pub(crate) fn exchange(random: &mut Random, split: Split) -> Exchange {
    loop {
        let (wording, answer) = match random.below(20) {
            0..10 => {
                let (wordings, answer) = TALK[random.below(TALK.len())];
                (random.pick(wordings).to_owned(), answer.to_owned())
            }
            10..13 => unknown(random),
            13..16 => sum(random),
            _ => fact(random),
        };
        let exchange = Exchange { question: question(random, &wording), answer };
        let of = if exchange.question == THE_QUESTION { Split::Train } else { Split::of(&exchange.key()) };
        if of == split {
            return exchange;
        }
    }
}

const SYSTEM: [&str; 4] = [
    "Answer in one sentence.",
    "You are a helpful assistant.",
    "You are Ternion's tiny demo model.",
    "Answer briefly and politely.",
];

/// A conversation of one turn, sometimes of two or three, sometimes with a system message.
pub(crate) fn document(random: &mut Random) -> Document {
    let mut document = Document::default();
    let mut past = String::new();
    if random.below(8) == 0 {
        past = format!("System: {}{END_OF_TURN}", random.pick(&SYSTEM));
    }
    let turns = if random.below(5) == 0 { random.between(2, 3) } else { 1 };
    for turn in 1..=turns {
        let Exchange { question, answer } = exchange(random, Split::Train);
        past += &format!("User: {question}{END_OF_TURN}Assistant: ");
        if turn == turns {
            // The prompt ends with a space that an answer in the middle of a text would take.
            document.push(std::mem::take(&mut past), Role::Given);
            document.push(answer + END_OF_TURN, Role::Said);
        } else {
            past += &answer;
            past += END_OF_TURN;
        }
    }
    document
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_question_has_one_answer() {
        let mut random = Random::new(11, 0);
        let mut answers = HashMap::new();
        for _ in 0..20_000 {
            let Exchange { question, answer } = exchange(&mut random, Split::Train);
            let words = question.to_lowercase();
            let known = answers.entry(words).or_insert_with(|| answer.clone());
            assert_eq!(*known, answer, "{question}");
        }
    }

    #[test]
    fn the_question_of_the_readme_is_trained_on() {
        let mut random = Random::new(3, 0);
        assert!((0..20_000).any(|_| exchange(&mut random, Split::Train).question == THE_QUESTION));
    }
}
