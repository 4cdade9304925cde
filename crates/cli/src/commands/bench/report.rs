//! Results as text, and the table that comparisons are printed in, too.

use super::result::{Point, Results, Spread};
use crate::output::bytes;

/// The whole report, without a line feed at its end.
pub(super) fn text(results: &Results) -> String {
    let mut rows = vec![
        ("model", format!("{} ({}), {}", results.model.name, results.model.backend, results.model.format)),
        ("machine", results.machine.line()),
    ];
    for load in &results.loads {
        let reads = match load.bandwidth_bytes_per_second {
            Some(rate) => format!(", memory is read at {:.1} GB/s", rate / 1e9),
            None => String::new(),
        };
        rows.push(("threads", format!("{}: loaded in {:.3} s{reads}", load.threads, load.seconds)));
    }
    if let Some(reads) = &results.reads {
        let kv = match reads.kv_position {
            Some(kv) => format!(", and {} of keys and values for each token of context", bytes(kv)),
            None => String::new(),
        };
        rows.push((
            "decode reads",
            format!(
                "{} of weights, {} of them the head{kv}",
                bytes(reads.linears + reads.head),
                bytes(reads.head)
            ),
        ));
    }
    memory(results, &mut rows);
    rows.push((
        "speeds",
        format!(
            "median (least-most) of {} {} after {} that {} not counted",
            results.repeat,
            if results.repeat == 1 { "run" } else { "runs" },
            results.warm_up,
            if results.warm_up == 1 { "is" } else { "are" },
        ),
    ));
    let rows: Vec<String> = rows.iter().map(|(name, value)| format!("{name:14} {value}")).collect();
    format!("{}\n\n{}", rows.join("\n"), table(&points(results)))
}

fn memory(results: &Results, rows: &mut Vec<(&str, String)>) {
    if let Some(memory) = results.memory {
        rows.push((
            "peak memory",
            format!(
                "{}; now {} of its own and {} of mapped files",
                bytes(memory.peak),
                bytes(memory.anonymous),
                bytes(memory.mapped)
            ),
        ));
    }
    if let Some(plan) = &results.memory_plan {
        let share = results.memory.map_or(String::new(), |memory| {
            format!("; the peak is {:.1} % of it", 100.0 * memory.peak as f64 / plan.total().max(1) as f64)
        });
        rows.push(("memory plan", format!("{}{share}", bytes(plan.total()))));
        rows.push(("planned for", plan.to_string()));
    }
    if let Some(rate) = results.streamed_bytes_per_second {
        rows.push(("disk reads", format!("{:.2} GB/s of weights while decoding", rate / 1e9)));
    }
}

fn points(results: &Results) -> Vec<Vec<String>> {
    type Column = (&'static str, fn(&Point) -> Option<String>);
    let columns: [Column; 9] = [
        ("threads", |p| Some(p.threads.to_string())),
        ("sequences", |p| Some(p.batch.to_string())),
        ("context", |p| Some(p.prompt_tokens.to_string())),
        ("prefill tokens/s", |p| p.prefill_tokens_per_second.map(spread)),
        ("first token s", |p| p.first_token_seconds.map(spread)),
        ("decode tokens/s", |p| p.decode_tokens_per_second.map(spread)),
        ("of the limit", |p| {
            let (share, limit) = (p.decode_share_of_limit?, p.decode_limit_tokens_per_second?);
            Some(format!("{:.0} % of {}", 100.0 * share, number(limit)))
        }),
        ("prefill J/token", |p| p.prefill_joules_per_token.map(spread)),
        ("decode J/token", |p| p.decode_joules_per_token.map(spread)),
    ];
    // Columns without any value are left out: not every machine tells its energy.
    let shown = columns.iter().filter(|(_, value)| results.points.iter().any(|point| value(point).is_some()));
    let shown: Vec<&Column> = shown.collect();
    let mut rows = vec![shown.iter().map(|(title, _)| (*title).to_owned()).collect()];
    for point in &results.points {
        rows.push(shown.iter().map(|(_, value)| value(point).unwrap_or_else(|| "-".to_owned())).collect());
    }
    rows
}

/// A point as a line of its own, while others are still to come.
pub(super) fn progress(point: &Point) -> String {
    let decode = point
        .decode_tokens_per_second
        .map_or("no speed".to_owned(), |speed| format!("{} tokens/s", spread(speed)));
    format!(
        "decoding with threads {}, sequences {}, context {}: {decode}",
        point.threads, point.batch, point.prompt_tokens
    )
}

/// Rows of cells, each column as wide as its widest cell, aligned at the right.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The median with the least and the most.
pub(super) fn spread(Spread { min, median, max }: Spread) -> String {
    format!("{} ({}-{})", number(median), number(min), number(max))
}

/// Three digits that count.
pub(super) fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::super::reads::Reads;
    use super::super::result::tests::results;
    use super::*;

    #[test]
    fn columns_are_aligned_and_those_without_values_left_out() {
        let mut results = results(&[(1, 1, 512, &[9.0, 10.0, 12.0]), (2, 16, 8, &[])]);
        results.relate_to_limits(Some(Reads { linears: 40_000, head: 10_000, kv_position: Some(0) }));
        let text = super::text(&results);
        let table: Vec<&str> = text.split_once("\n\n").unwrap().1.lines().collect();
        assert_eq!(
            table,
            [
                "threads  sequences  context   decode tokens/s  of the limit",
                "      1          1      512  10.0 (9.00-12.0)  50 % of 20.0",
                "      2         16        8                 -             -",
            ]
        );
        for words in
            ["Some CPU, 2 of 4 cores", "48.8 KiB of weights, 9.8 KiB of them the head", "of 3 runs after 1"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
        results.points[0].decode_joules_per_token = Spread::of(&[0.25]);
        assert!(super::text(&results).contains("0.250 (0.250-0.250)"));
    }

    #[test]
    fn numbers_have_three_digits() {
        let found: Vec<String> = [1234.5, 99.94, 5.0, 0.0123].into_iter().map(number).collect();
        assert_eq!(found, ["1234", "99.9", "5.00", "0.012"]);
    }
}
