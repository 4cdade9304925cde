//! Literals as Jinja2 reads them.

use super::{Result, fail};

/// A string literal with the escapes of Python, as a literal that minijinja reads the same.
pub(super) fn string(literal: &str) -> Result<String> {
    let inner = literal.get(1..literal.len().saturating_sub(1)).unwrap_or_default();
    let mut result = String::with_capacity(literal.len());
    result.push('"');
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            push(&mut result, c);
            continue;
        }
        let escape = chars.next().ok_or_else(|| fail("a string ends within an escape"))?;
        let c = match escape {
            // A line that goes on in the next one.
            '\n' => continue,
            '\\' | '\'' | '"' => escape,
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{C}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\u{B}',
            'x' => hex(&mut chars, 2)?,
            'u' => hex(&mut chars, 4)?,
            'U' => hex(&mut chars, 8)?,
            'N' => return Err(fail("characters by name (`\\N{...}`) are not supported")),
            '0'..='7' => {
                let rest = chars.as_str();
                let more = rest.bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let digits: String = std::iter::once(escape).chain(rest[..more].chars()).collect();
                chars = rest[more..].chars();
                u32::from_str_radix(&digits, 8).ok().and_then(char::from_u32).unwrap_or_default()
            }
            other => {
                push(&mut result, '\\');
                other
            }
        };
        push(&mut result, c);
    }
    result.push('"');
    Ok(result)
}

fn push(result: &mut String, c: char) {
    if matches!(c, '"' | '\\') {
        result.push('\\');
    }
    result.push(c);
}

fn hex(chars: &mut std::str::Chars<'_>, digits: usize) -> Result<char> {
    let text: String = chars.by_ref().take(digits).collect();
    let is_hex = text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    let c = if is_hex { u32::from_str_radix(&text, 16).ok().and_then(char::from_u32) } else { None };
    c.ok_or_else(|| fail(format!("a string has the escape `{text}`, which is no character")))
}

/// # Errors
/// For numbers that minijinja accepts and Jinja2 does not.
pub(super) fn check_number(literal: &str) -> Result<()> {
    let digits = literal.bytes().all(|b| b.is_ascii_digit() || b == b'_');
    let leading_zero =
        digits && literal.starts_with('0') && literal.bytes().any(|b| b.is_ascii_digit() && b != b'0');
    let open_fraction = literal.ends_with('.') || literal.contains(".e") || literal.contains(".E");
    if leading_zero || (open_fraction && !literal.starts_with("0x")) {
        return Err(fail(format!("`{literal}` is not a number")));
    }
    Ok(())
}
