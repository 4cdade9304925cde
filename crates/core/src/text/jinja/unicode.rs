//! Properties of characters as `str` of Python has them.

use std::sync::LazyLock;

use regex::Regex;

/// Whether a one-character text matches an expression of Unicode classes.
fn matches(expression: &Regex, c: char) -> bool {
    expression.is_match(c.encode_utf8(&mut [0; 4]))
}

macro_rules! class {
    ($(#[$doc:meta])* $name:ident, $ascii:expr, $expression:literal) => {
        $(#[$doc])*
        pub(super) fn $name(c: char) -> bool {
            static EXPRESSION: LazyLock<Regex> =
                LazyLock::new(|| Regex::new($expression).expect("the expression is a constant"));
            let ascii: fn(u8) -> bool = $ascii;
            u8::try_from(c).ok().filter(u8::is_ascii).map_or_else(|| matches(&EXPRESSION, c), ascii)
        }
    };
}

class!(
    /// `str.isalpha`.
    is_alpha, |b| b.is_ascii_alphabetic(), r"^\p{L}$"
);
class!(
    /// `str.isdecimal`.
    is_decimal, |b| b.is_ascii_digit(), r"^\p{Nd}$"
);
class!(
    /// `str.isdigit`: decimals, and digits in circles, superscripts and the like.
    is_digit, |b| b.is_ascii_digit(),
    "^[\\p{Nd}\u{b2}\u{b3}\u{b9}\u{1369}-\u{1371}\u{19da}\u{2070}\u{2074}-\u{2079}\u{2080}-\u{2089}\u{2460}-\u{2468}\u{2474}-\u{247c}\u{2488}-\u{2490}\u{24ea}\u{24f5}-\u{24fd}\u{24ff}\u{2776}-\u{277e}\u{2780}-\u{2788}\u{278a}-\u{2792}\u{10a40}-\u{10a43}\u{10e60}-\u{10e68}\u{11052}-\u{1105a}\u{1f100}-\u{1f10a}]$"
);
class!(
    /// `str.isnumeric`: all characters with a numeric value, ideographs among them.
    is_numeric, |b| b.is_ascii_digit(),
    "^[\\p{N}\u{3405}\u{3483}\u{382a}\u{3b4d}\u{4e00}\u{4e03}\u{4e07}\u{4e09}\u{4e5d}\u{4e8c}\u{4e94}\u{4e96}\u{4ebf}-\u{4ec0}\u{4edf}\u{4ee8}\u{4f0d}\u{4f70}\u{5104}\u{5146}\u{5169}\u{516b}\u{516d}\u{5341}\u{5343}-\u{5345}\u{534c}\u{53c1}-\u{53c4}\u{56db}\u{58f1}\u{58f9}\u{5e7a}\u{5efe}-\u{5eff}\u{5f0c}-\u{5f0e}\u{5f10}\u{62fe}\u{634c}\u{67d2}\u{6f06}\u{7396}\u{767e}\u{8086}\u{842c}\u{8cae}\u{8cb3}\u{8d30}\u{9621}\u{9646}\u{964c}\u{9678}\u{96f6}\u{f96b}\u{f973}\u{f978}\u{f9b2}\u{f9d1}\u{f9d3}\u{f9fd}]$"
);
class!(
    /// `str.isprintable`: the space is the only separator that is.
    is_printable, |b| (0x20..0x7F).contains(&b), r"^[^\p{C}\p{Z}]$"
);
class!(is_upper, |b| b.is_ascii_uppercase(), r"^\p{Uppercase}$");
class!(is_lower, |b| b.is_ascii_lowercase(), r"^\p{Lowercase}$");
class!(is_title, |_| false, r"^\p{Lt}$");
class!(
    /// A character that a word of `\w+` in Python's expressions may have.
    is_word, |b| b.is_ascii_alphanumeric() || b == b'_', r"^[\p{L}\p{N}]$"
);
class!(is_identifier_start, |b| b.is_ascii_alphabetic() || b == b'_', r"^\p{XID_Start}$");
class!(is_identifier_part, |b| b.is_ascii_alphanumeric() || b == b'_', r"^\p{XID_Continue}$");

/// `str.isspace`: Unicode white space and the four separators U+001C to U+001F.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c)
}

/// `str.islower` and `str.isupper`: there is a letter with a case, and all of them have this one.
pub(super) fn is_all(text: &str, wanted: fn(char) -> bool, others: [fn(char) -> bool; 2]) -> bool {
    !text.chars().any(|c| others.iter().any(|other| other(c))) && text.chars().any(wanted)
}

/// `str.istitle`.
pub(super) fn is_titled(text: &str) -> bool {
    let (mut in_word, mut any) = (false, false);
    for c in text.chars() {
        if is_upper(c) || is_title(c) {
            if in_word {
                return false;
            }
            (in_word, any) = (true, true);
        } else if is_lower(c) {
            if !in_word {
                return false;
            }
            any = true;
        } else {
            in_word = false;
        }
    }
    any
}

/// `str.casefold`.
pub(super) fn fold(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            // Letters whose upper case folds to something else.
            'ı' | '\u{13A0}'..='\u{13F5}' => result.push(c),
            '\u{13F8}'..='\u{13FD}' | '\u{AB70}'..='\u{ABBF}' => result.extend(c.to_uppercase()),
            'İ' => result.push_str("i̇"),
            // Upper case first, as several lower case letters share one: `ς` and `σ`, `ſ` and `s`.
            c => result.extend(c.to_uppercase().flat_map(char::to_lowercase)),
        }
    }
    result
}

/// Whether a character counts as part of a word for `str.title`.
pub(super) fn is_cased(c: char) -> bool {
    is_upper(c) || is_lower(c) || is_title(c)
}
