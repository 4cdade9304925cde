//! Sums and word problems of one or two steps, with answers as GSM8K writes them: each calculation in `<<>>`, the result
//! after `####`.

use super::{Document, END_OF_TEXT, Random, Role, Split};

/// A problem with its answer.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) question: String,
    pub(crate) answer: String,
    /// The template and the numbers, whoever has however many of whatever: by this a problem is held out.
    pub(crate) key: String,
}

/// `{n}` is a name, `{p}` its pronoun, `{o}` an object, `{a}` to `{c}` are numbers.
struct Template {
    question: &'static str,
    /// Left, operator, right; `r` is the last result.
    steps: &'static [(char, char, char)],
    /// What stands before and after the last calculation.
    answer: (&'static str, &'static str),
}

const fn template(
    question: &'static str,
    steps: &'static [(char, char, char)],
    before: &'static str,
    after: &'static str,
) -> Template {
    Template { question, steps, answer: (before, after) }
}

const ADD: &[(char, char, char)] = &[('a', '+', 'b')];
const SUBTRACT: &[(char, char, char)] = &[('a', '-', 'b')];
const MULTIPLY: &[(char, char, char)] = &[('a', '*', 'b')];
const ADD_ADD: &[(char, char, char)] = &[('a', '+', 'b'), ('r', '+', 'c')];
const ADD_SUBTRACT: &[(char, char, char)] = &[('a', '+', 'b'), ('r', '-', 'c')];
const SUBTRACT_ADD: &[(char, char, char)] = &[('a', '-', 'b'), ('r', '+', 'c')];
const MULTIPLY_ADD: &[(char, char, char)] = &[('a', '*', 'b'), ('r', '+', 'c')];
const MULTIPLY_SUBTRACT: &[(char, char, char)] = &[('a', '*', 'b'), ('r', '-', 'c')];

const TEMPLATES: [Template; 20] = [
    template("What is {a} + {b}?", ADD, "", ""),
    template("What is {a} - {b}?", SUBTRACT, "", ""),
    template("What is {a} * {b}?", MULTIPLY, "", ""),
    template("What is {a} + {b} + {c}?", ADD_ADD, "", ""),
    template("What is {a} + {b} - {c}?", ADD_SUBTRACT, "", ""),
    template("What is {a} * {b} + {c}?", MULTIPLY_ADD, "", ""),
    template(
        "{n} has {a} {o}. {p} buys {b} more {o}. How many {o} does {n} have now?",
        ADD,
        "{n} has ",
        " {o} now.",
    ),
    template(
        "{n} finds {a} {o} in the morning and {b} {o} in the evening. How many {o} does {n} find in total?",
        ADD,
        "{n} finds ",
        " {o} in total.",
    ),
    template(
        "There are {a} {o} in a box and {b} {o} in a bag. How many {o} are there in total?",
        ADD,
        "There are ",
        " {o} in total.",
    ),
    template(
        "{n} has {a} {o}. {p} gives {b} {o} to a friend. How many {o} does {n} have left?",
        SUBTRACT,
        "{n} has ",
        " {o} left.",
    ),
    template(
        "{n} had {a} {o} and lost {b} of them. How many {o} are left?",
        SUBTRACT,
        "There are ",
        " {o} left.",
    ),
    template(
        "There are {a} {o}. {n} takes {b} {o}. How many {o} are left?",
        SUBTRACT,
        "There are ",
        " {o} left.",
    ),
    template(
        "{n} has {a} boxes. There are {b} {o} in each box. How many {o} does {n} have?",
        MULTIPLY,
        "{n} has ",
        " {o}.",
    ),
    template(
        "{n} buys {a} {o}. Each costs {b} dollars. How many dollars does {n} pay?",
        MULTIPLY,
        "{n} pays ",
        " dollars.",
    ),
    template(
        "{n} finds {a} {o} every day. How many {o} does {n} find in {b} days?",
        MULTIPLY,
        "{n} finds ",
        " {o}.",
    ),
    template(
        "{n} has {a} {o}. {p} buys {b} more and then finds {c} more. How many {o} does {n} have now?",
        ADD_ADD,
        "{n} has ",
        " {o} now.",
    ),
    template(
        "{n} has {a} {o}. {p} buys {b} more and gives {c} to a friend. How many {o} does {n} have left?",
        ADD_SUBTRACT,
        "{n} has ",
        " {o} left.",
    ),
    template(
        "{n} has {a} {o}. {p} loses {b} of them and then buys {c} more. How many {o} does {n} have now?",
        SUBTRACT_ADD,
        "{n} has ",
        " {o} now.",
    ),
    template(
        "{n} has {a} boxes with {b} {o} in each and {c} more {o} in a bag. How many {o} does {n} have?",
        MULTIPLY_ADD,
        "{n} has ",
        " {o}.",
    ),
    template(
        "{n} has {a} bags with {b} {o} in each. {p} gives {c} {o} to a friend. How many {o} does {n} have left?",
        MULTIPLY_SUBTRACT,
        "{n} has ",
        " {o} left.",
    ),
];

const NAMES: [(&str, &str); 20] = [
    ("Tom", "He"),
    ("Anna", "She"),
    ("Ben", "He"),
    ("Lucy", "She"),
    ("Sam", "He"),
    ("Maria", "She"),
    ("Paul", "He"),
    ("Emma", "She"),
    ("Jack", "He"),
    ("Nina", "She"),
    ("Leo", "He"),
    ("Sara", "She"),
    ("Max", "He"),
    ("Julia", "She"),
    ("Peter", "He"),
    ("Rosa", "She"),
    ("David", "He"),
    ("Clara", "She"),
    ("Oscar", "He"),
    ("Lily", "She"),
];

const OBJECTS: [&str; 20] = [
    "apples", "books", "pens", "cards", "eggs", "coins", "balls", "stones", "shells", "cakes", "toys",
    "stamps", "flowers", "cups", "keys", "nuts", "plums", "ribbons", "buttons", "tickets",
];

/// Numbers for the steps of a template.
fn numbers(random: &mut Random, steps: &[(char, char, char)]) -> [usize; 3] {
    let mut third = |high: usize| random.between(2, high);
    let c = third(9);
    let (a, b, c) = match (steps[0].1, steps.get(1).map(|step| step.1)) {
        ('+', _) => (random.between(2, 20), random.between(2, 20), c),
        ('-', _) => {
            let a = random.between(5, 30);
            (a, random.between(1, a - 1), c)
        }
        _ => (random.between(2, 9), random.between(2, 9), c),
    };
    // A difference stays positive.
    let first = if steps[0].1 == '*' { a * b } else { a + b };
    [a, b, if steps.get(1).is_some_and(|step| step.1 == '-') { c.min(first - 1) } else { c }]
}

/// A problem of this split.
pub(crate) fn problem(random: &mut Random, split: Split) -> Problem {
    loop {
        let index = random.below(TEMPLATES.len());
        let template = &TEMPLATES[index];
        let numbers = numbers(random, template.steps);
        let used = template.steps.len() + 1;
        let key = format!("problem {index} {:?}", &numbers[..used]);
        let (name, pronoun) = random.pick(&NAMES);
        let object = random.pick(&OBJECTS);
        if Split::of(&key) != split {
            continue;
        }
        let fill = |text: &str| {
            let mut text = text.replace("{n}", name).replace("{p}", pronoun).replace("{o}", object);
            for (letter, number) in ["{a}", "{b}", "{c}"].iter().zip(numbers) {
                text = text.replace(letter, &number.to_string());
            }
            text
        };
        let mut answer = String::new();
        let mut result = 0;
        for (step, &(left, operator, right)) in template.steps.iter().enumerate() {
            let value = |letter: char| match letter {
                'a'..='c' => numbers[letter as usize - 'a' as usize],
                _ => result,
            };
            let (left, right) = (value(left), value(right));
            result = match operator {
                '+' => left + right,
                '-' => left - right,
                _ => left * right,
            };
            let last = step + 1 == template.steps.len();
            let (before, after) = if last { template.answer } else { ("", "") };
            answer += &fill(before);
            answer += &format!("{left} {operator} {right} = <<{left}{operator}{right}={result}>>{result}");
            answer += &fill(after);
            answer.push('\n');
        }
        answer += &format!("#### {result}");
        return Problem { question: fill(template.question), answer, key };
    }
}

/// Problems as lm-evaluation-harness lays out GSM8K, `shots` of them before the last.
pub(crate) fn document(random: &mut Random, shots: usize) -> Document {
    let mut document = Document::default();
    for shot in 0..=shots {
        let problem = problem(random, Split::Train);
        document.push(format!("Question: {}\nAnswer:", problem.question), Role::Given);
        document.push(format!(" {}", problem.answer), Role::Said);
        document.push(if shot == shots { END_OF_TEXT } else { "\n\n" }, Role::Said);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_are_right_and_end_with_the_result() {
        let mut random = Random::new(7, 0);
        for _ in 0..5000 {
            let problem = problem(&mut random, Split::Train);
            let mut last = String::new();
            for step in problem.answer.split("<<").skip(1) {
                let (step, _) = step.split_once(">>").unwrap();
                let (sum, result) = step.split_once('=').unwrap();
                let at = sum.find(['+', '-', '*']).unwrap();
                let (left, right): (i64, i64) = (sum[..at].parse().unwrap(), sum[at + 1..].parse().unwrap());
                let expected = match &sum[at..=at] {
                    "+" => left + right,
                    "-" => left - right,
                    _ => left * right,
                };
                assert_eq!(result, expected.to_string(), "{problem:?}");
                assert!((0..100).contains(&expected), "{problem:?}");
                last = result.to_owned();
            }
            assert!(problem.answer.ends_with(&format!("\n#### {last}")), "{problem:?}");
            assert!(!problem.question.contains(['{', '}']) && !problem.answer.contains('{'), "{problem:?}");
        }
    }
}
