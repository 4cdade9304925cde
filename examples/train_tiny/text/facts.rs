//! Small facts with four choices, laid out as lm-evaluation-harness prompts MMLU.

use super::{Document, END_OF_TEXT, Random, Role, Split};

/// The subjects, by the names of their files.
pub(crate) const SUBJECTS: [&str; 4] = ["calendar", "number_words", "opposites", "word_categories"];

pub(crate) const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

pub(crate) const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

pub(crate) const OPPOSITES: [(&str, &str); 30] = [
    ("hot", "cold"),
    ("big", "small"),
    ("old", "young"),
    ("fast", "slow"),
    ("light", "dark"),
    ("happy", "sad"),
    ("high", "low"),
    ("open", "closed"),
    ("full", "empty"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("early", "late"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("clean", "dirty"),
    ("near", "far"),
    ("up", "down"),
    ("left", "right"),
    ("day", "night"),
    ("good", "bad"),
    ("long", "short"),
    ("wide", "narrow"),
    ("loud", "quiet"),
    ("first", "last"),
    ("thick", "thin"),
    ("true", "false"),
    ("heavy", "weightless"),
    ("cheap", "expensive"),
    ("brave", "afraid"),
    ("win", "lose"),
];

pub(crate) const NUMBERS: [&str; 20] = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
];

/// What kind of thing, with its article, and things of that kind.
pub(crate) const CATEGORIES: [(&str, [&str; 8]); 8] = [
    ("an animal", ["dog", "cat", "horse", "cow", "lion", "tiger", "sheep", "mouse"]),
    ("a fruit", ["apple", "banana", "pear", "plum", "cherry", "grape", "lemon", "peach"]),
    ("a colour", ["red", "blue", "green", "yellow", "white", "black", "purple", "grey"]),
    ("a tool", ["hammer", "saw", "drill", "spade", "wrench", "axe", "rake", "chisel"]),
    ("a vehicle", ["car", "bus", "train", "truck", "bicycle", "boat", "plane", "tram"]),
    ("a part of the body", ["hand", "foot", "head", "arm", "leg", "nose", "ear", "knee"]),
    ("a piece of clothing", ["shirt", "coat", "hat", "sock", "glove", "scarf", "shoe", "dress"]),
    ("a piece of furniture", ["table", "chair", "bed", "sofa", "desk", "shelf", "bench", "wardrobe"]),
];

/// Of the choices.
const LETTERS: [char; 4] = ['A', 'B', 'C', 'D'];

/// A question with four choices.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) question: String,
    pub(crate) choices: [String; 4],
    /// Index of the right one.
    pub(crate) answer: usize,
}

impl Choice {
    /// The question and the set of choices, in whatever order they stand: by this a question is held out.
    pub(crate) fn key(&self) -> String {
        let mut choices = self.choices.clone();
        choices.sort();
        format!("{} {choices:?}", self.question)
    }

    /// The letter of the right choice.
    pub(crate) fn letter(&self) -> char {
        LETTERS[self.answer]
    }

    /// The prompt without the letter.
    pub(crate) fn prompt(&self) -> String {
        let [a, b, c, d] = &self.choices;
        format!("{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:", self.question)
    }
}

/// What stands above the questions of a subject.
pub(crate) fn description(subject: &str) -> String {
    let subject = subject.replace('_', " ");
    format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
}

/// A question of this split, of `subject` or any.
pub(crate) fn choice(random: &mut Random, split: Split, subject: Option<&'static str>) -> Choice {
    loop {
        let subject = subject.unwrap_or_else(|| random.pick(&SUBJECTS));
        let (question, right, mut wrong) = match subject {
            "calendar" => calendar(random),
            "number_words" => number(random),
            "opposites" => opposite(random),
            _ => category(random),
        };
        random.shuffle(&mut wrong);
        wrong.truncate(3);
        let answer = random.below(4);
        wrong.insert(answer, right);
        let choices = wrong.try_into().expect("invariant: there are at least three wrong choices");
        let choice = Choice { question, choices, answer };
        if Split::of(&choice.key()) == split {
            return choice;
        }
    }
}

type Parts = (String, String, Vec<String>);

fn calendar(random: &mut Random) -> Parts {
    let (what, names): (&str, &[&str]) =
        if random.below(2) == 0 { ("day", &DAYS) } else { ("month", &MONTHS) };
    let at = random.below(names.len());
    let (question, step) = match random.below(2) {
        0 => (format!("Which {what} comes right after {}?", names[at]), 1),
        _ => (format!("Which {what} comes right before {}?", names[at]), names.len() - 1),
    };
    let right = (at + step) % names.len();
    let wrong = (0..names.len()).filter(|i| *i != right && *i != at).map(|i| names[i].to_owned());
    (question, names[right].to_owned(), wrong.collect())
}

fn number(random: &mut Random) -> Parts {
    let low = random.below(NUMBERS.len() - 1);
    let (question, right) = match random.below(2) {
        0 => (format!("Which number is one more than {}?", NUMBERS[low]), low + 1),
        _ => (format!("Which number is one less than {}?", NUMBERS[low + 1]), low),
    };
    let wrong = (0..NUMBERS.len()).filter(|i| *i != low && *i != low + 1).map(|i| NUMBERS[i].to_owned());
    (question, NUMBERS[right].to_owned(), wrong.collect())
}

fn opposite(random: &mut Random) -> Parts {
    let (mut word, mut right) = random.pick(&OPPOSITES);
    if random.below(2) == 0 {
        (word, right) = (right, word);
    }
    let others = OPPOSITES.iter().filter(|(a, b)| *a != word && *b != word);
    let wrong = others.map(|&(a, b)| if random.below(2) == 0 { a } else { b }.to_owned()).collect();
    (format!("What is the opposite of {word}?"), right.to_owned(), wrong)
}

fn category(random: &mut Random) -> Parts {
    let at = random.below(CATEGORIES.len());
    let (kind, members) = CATEGORIES[at];
    let right = random.pick(&members).to_owned();
    let others = CATEGORIES.iter().enumerate().filter(|(i, _)| *i != at);
    let wrong = others.map(|(_, (_, members))| random.pick(members).to_owned()).collect();
    (format!("Which of these is {kind}?"), right, wrong)
}

/// Questions of one subject, `shots` of them before the last.
pub(crate) fn document(random: &mut Random, shots: usize) -> Document {
    let mut document = Document::default();
    let subject = random.pick(&SUBJECTS);
    document.push(description(subject), Role::Given);
    for shot in 0..=shots {
        let choice = choice(random, Split::Train, Some(subject));
        document.push(format!("{}\n", choice.question), Role::Given);
        for (i, text) in choice.choices.iter().enumerate() {
            let letter = LETTERS[i];
            document.push(format!("{letter}. {text}"), Role::Given);
            document.push("\n", Role::Verdict((i == choice.answer).then_some(letter)));
        }
        document.push("Answer:", Role::Given);
        document.push(format!(" {}", choice.letter()), Role::Letter);
        document.push(if shot == shots { END_OF_TEXT } else { "\n\n" }, Role::Given);
    }
    document
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn one_of_four_different_choices_is_right() {
        let mut random = Random::new(5, 0);
        let mut letters = [0; 4];
        for _ in 0..4000 {
            let choice = choice(&mut random, Split::Train, None);
            assert_eq!(choice.choices.iter().collect::<HashSet<_>>().len(), 4, "{choice:?}");
            letters[choice.answer] += 1;
            let right = choice.choices[choice.answer].as_str();
            if let Some(asked) = choice.question.strip_prefix("Which number is one ") {
                let (direction, word) = asked.trim_end_matches('?').split_once(" than ").unwrap();
                let at = NUMBERS.iter().position(|number| *number == word).unwrap();
                assert_eq!(right, NUMBERS[if direction == "more" { at + 1 } else { at - 1 }]);
            }
        }
        assert!(letters.iter().all(|n| (900..1100).contains(n)), "{letters:?}");
    }

    #[test]
    fn words_have_one_opposite_and_one_category() {
        let words: Vec<&str> = OPPOSITES.iter().flat_map(|(a, b)| [*a, *b]).collect();
        assert_eq!(words.iter().collect::<HashSet<_>>().len(), words.len());
        let things: Vec<&str> = CATEGORIES.iter().flat_map(|(_, members)| *members).collect();
        assert_eq!(things.iter().collect::<HashSet<_>>().len(), things.len());
    }
}
