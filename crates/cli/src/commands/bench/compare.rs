//! Two results beside each other: what became faster, and whether it is more than the runs scatter.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::report::{number, table};
use super::result::{FORMAT, Point, Results, Spread, VERSION};
use crate::App;
use crate::failure::{Failure, Outcome};
use crate::input::TextSource;

/// One measure of one point in both.
#[derive(Debug, Serialize)]
struct Compared {
    threads: usize,
    batch: usize,
    prompt_tokens: usize,
    decode_tokens: usize,
    measure: &'static str,
    old: Spread,
    new: Spread,
    /// Of the medians, new by old.
    ratio: f64,
    /// The spreads overlap; `None` where one of them is of one run, which has none.
    within_noise: Option<bool>,
}

/// All that is in both, and how many points are not.
#[derive(Debug, Serialize)]
struct Comparison {
    same_machine: bool,
    same_model: bool,
    measures: Vec<Compared>,
    points_only_in_old: usize,
    points_only_in_new: usize,
}

type Measure = (&'static str, fn(&Point) -> Option<Spread>);
const MEASURES: [Measure; 5] = [
    ("prefill tokens/s", |p| p.prefill_tokens_per_second),
    ("decode tokens/s", |p| p.decode_tokens_per_second),
    ("first token s", |p| p.first_token_seconds),
    ("prefill J/token", |p| p.prefill_joules_per_token),
    ("decode J/token", |p| p.decode_joules_per_token),
];

pub(super) fn run(app: &App, old: &Path, new: &Path) -> Outcome {
    let (old, new) = (read(old)?, read(new)?);
    let found = compare(&old, &new);
    if app.output.json {
        return app.output.object(&found);
    }
    for (what, same) in [("machines", found.same_machine), ("models", found.same_model)] {
        if !same {
            app.output.notice(&format!("warning: the {what} are not the same"));
        }
    }
    for (name, side) in [("old", &old), ("new", &new)] {
        let model = &side.model;
        app.output.line(&format!("{name}  {} ({}), {}", model.name, model.backend, model.format))?;
        app.output.line(&format!("     {}", side.machine.line()))?;
    }
    app.output.line("")?;
    if found.measures.is_empty() {
        app.output.line("no point is in both")?;
    } else {
        app.output.line(&table(&rows(&found)))?;
    }
    for (count, side) in [(found.points_only_in_old, "old"), (found.points_only_in_new, "new")] {
        if count > 0 {
            let points = if count == 1 { "point is" } else { "points are" };
            app.output.line(&format!("{count} {points} only in {side}"))?;
        }
    }
    Ok(())
}

/// Reads a result that `--save` has written.
fn read(path: &Path) -> Outcome<Results> {
    #[derive(Deserialize)]
    struct Header {
        format: String,
        version: u32,
    }
    let wrong = |what: String| {
        Failure::usage(format!(
            "{}: {what}; expected a result that `ternion bench --save` has written",
            path.display()
        ))
    };
    let text = TextSource::File(path).read("result")?;
    let header: Header = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    if header.format != FORMAT {
        return Err(wrong(format!("format is `{}` instead of `{FORMAT}`", header.format)));
    }
    if header.version != VERSION {
        return Err(Failure::usage(format!(
            "{}: version {} of the format; this program reads version {VERSION}, so measure both with the same Ternion",
            path.display(),
            header.version
        )));
    }
    serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))
}

fn compare(old: &Results, new: &Results) -> Comparison {
    let key = |p: &Point| (p.threads, p.batch, p.prompt_tokens, p.decode_tokens);
    let only = |a: &Results, b: &Results| {
        a.points.iter().filter(|p| !b.points.iter().any(|q| key(p) == key(q))).count()
    };
    let mut measures = Vec::new();
    for a in &old.points {
        let Some(b) = new.points.iter().find(|b| key(a) == key(b)) else { continue };
        for (measure, value) in MEASURES {
            let (Some(old), Some(new)) = (value(a), value(b)) else { continue };
            measures.push(Compared {
                threads: a.threads,
                batch: a.batch,
                prompt_tokens: a.prompt_tokens,
                decode_tokens: a.decode_tokens,
                measure,
                old,
                new,
                ratio: new.median / old.median,
                within_noise: (a.runs > 1 && b.runs > 1).then(|| old.overlaps(&new)),
            });
        }
    }
    let (a, b) = (&old.machine, &new.machine);
    Comparison {
        // The load and the program may well differ.
        same_machine: (&a.cpu, a.cores_available, &a.instructions)
            == (&b.cpu, b.cores_available, &b.instructions),
        same_model: (&old.model.name, old.model.parameters) == (&new.model.name, new.model.parameters),
        measures,
        points_only_in_old: only(old, new),
        points_only_in_new: only(new, old),
    }
}

fn rows(found: &Comparison) -> Vec<Vec<String>> {
    let titles = ["threads", "sequences", "context", "measure", "old", "new", "new/old", ""];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for one in &found.measures {
        let verdict = match one.within_noise {
            Some(true) => "within noise",
            Some(false) => "",
            None => "one run, noise unknown",
        };
        rows.push(vec![
            one.threads.to_string(),
            one.batch.to_string(),
            one.prompt_tokens.to_string(),
            one.measure.to_owned(),
            number(one.old.median),
            number(one.new.median),
            format!("{:.3}", one.ratio),
            verdict.to_owned(),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;
    use super::*;

    #[test]
    fn points_are_paired_and_overlapping_spreads_are_noise() {
        let old = results(&[
            (1, 1, 8, &[10.0, 9.0, 11.0]),
            (2, 1, 8, &[20.0, 21.0]),
            (2, 4, 8, &[5.0]),
            (9, 1, 8, &[1.0]),
        ]);
        let new = results(&[
            (2, 4, 8, &[5.0]),
            (2, 1, 8, &[30.0, 29.0]),
            (1, 1, 8, &[12.0, 11.0]),
            (1, 1, 9, &[1.0]),
        ]);
        let found = compare(&old, &new);
        let told: Vec<_> =
            found.measures.iter().map(|m| (m.threads, m.batch, m.ratio, m.within_noise)).collect();
        let ratio = 29.5 / 20.5;
        assert_eq!(told, [(1, 1, 1.15, Some(true)), (2, 1, ratio, Some(false)), (2, 4, 1.0, None)]);
        assert_eq!((found.points_only_in_old, found.points_only_in_new), (1, 1));
        assert!(found.same_machine && found.same_model);
        let text = table(&rows(&found));
        let line = |i: usize| text.lines().nth(i).unwrap().to_owned();
        assert!(line(1).ends_with("1.150            within noise"), "{text}");
        assert!(line(2).ends_with("1.439") && line(3).ends_with("noise unknown"), "{text}");

        let mut other = new.clone();
        other.machine.instructions = "AVX2".into();
        other.model.parameters += 1;
        let found = compare(&old, &other);
        assert!(!found.same_machine && !found.same_model);
    }

    #[test]
    fn a_file_that_is_none_is_named_with_what_is_expected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.json");
        let mut right = results(&[(1, 1, 8, &[1.0])]);
        let said = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let message = read(&path).unwrap_err().message().unwrap();
            assert!(message.contains("r.json: "), "{message}");
            message
        };
        assert!(said("nonsense").contains("ternion bench --save"));
        assert!(said("{}").contains("`format`"));
        assert!(said("{\"format\": \"other\", \"version\": 1}").contains("`other` instead of"));
        assert!(said("{\"format\": \"ternion-bench\", \"version\": 1}").contains("missing field"));
        right.version = 2;
        assert!(said(&serde_json::to_string(&right).unwrap()).contains("version 2"));
        right.version = VERSION;
        std::fs::write(&path, serde_json::to_string(&right).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap().points, right.points);
        assert!(read(&folder.path().join("none")).unwrap_err().message().unwrap().contains("cannot be read"));
    }
}
