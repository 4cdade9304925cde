//! `ternion conformance`: whether models that should be the same one are, and how far they are apart; of one model alone,
//! whether its backend keeps the contract.

use std::path::Path;

use minijinja::{
    Environment,
    value::{Serde, Value},
};
use serde::Serialize;
use ternion::ModelInfo;
use ternion_conformance::compare::{Answers, Comparison, Finding, Inputs, Questions, Tolerances};

use super::{contract, load};
use crate::App;
use crate::args::ModelArgs;
use crate::args_conformance::ConformanceArgs;
use crate::failure::{Failure, Outcome};
use crate::input::{TextSource, write_atomically};
use crate::model::Selected;
#[cfg(feature = "plots")]
use crate::plot::{Plot, Series};

const PAGE: &str = include_str!("../../data/conformance.html");

/// One model beside the reference.
#[derive(Debug, Serialize)]
struct Compared {
    passed: bool,
    tolerances: Tolerances,
    findings: Vec<Finding>,
    #[serde(flatten)]
    difference: Comparison,
}

pub(crate) async fn run(app: &App, args: &ConformanceArgs) -> Outcome {
    let mut models = select(app, args)?;
    if models.len() == 1 {
        return contract::run(app, models.remove(0)).await;
    }
    let inputs = inputs(args)?;
    let mut asked: Option<(Questions, Answers)> = None;
    let mut compared = Vec::new();
    for selected in &models {
        // Loaded one after the other: the last one is gone before the next one comes.
        let backend = load(app, selected).await?;
        let info = backend.info();
        app.output.notice(&format!("asking {} ({} on {})", info.name, info.format, info.backend));
        let interrupted = app.interrupts.renew();
        let questions = match &asked {
            Some((questions, _)) => questions.clone(),
            None => Questions::for_model(&*backend, &inputs)?,
        };
        let answers = tokio::select! {
            answers = Answers::of(&*backend, &questions) => answers?,
            () = interrupted.cancelled() => return Err(Failure::Interrupted),
        };
        app.interrupts.idle();
        let Some((questions, reference)) = &asked else {
            asked = Some((questions, answers));
            continue;
        };
        let difference = Comparison::new(questions, reference, &answers);
        let tolerances = args.tolerances.over(Tolerances::for_pair(&difference.reference, &difference.model));
        let findings = difference.findings(&tolerances);
        let passed = findings.iter().all(|finding| finding.passed);
        let one = Compared { passed, tolerances, findings, difference };
        if !app.output.json {
            print(app, &one)?;
        }
        compared.push(one);
    }

    let passed = compared.iter().all(|one| one.passed);
    if let Some(path) = &args.html {
        write_page(app, path, &compared, passed)?;
        let what = if cfg!(feature = "plots") {
            "with plots"
        } else {
            "without plots, which need the feature `plots`"
        };
        app.output.notice(&format!("{}: the same {what}", path.display()));
    }
    if app.output.json {
        app.output.object(&serde_json::json!({ "passed": passed, "comparisons": compared }))?;
    }
    if passed { Ok(()) } else { Err(Failure::Beyond) }
}

/// The models in the order of the command line: several configurations, or several models of one.
fn select(app: &App, args: &ConformanceArgs) -> Outcome<Vec<Selected>> {
    let model = |path: &Path, name: Option<&String>| {
        Selected::for_files(
            app,
            &ModelArgs { model: Some(path.to_owned()), name: name.cloned(), ..ModelArgs::default() },
        )
    };
    match (&args.models[..], &args.names[..]) {
        ([], []) => Ok(vec![Selected::for_files(app, &ModelArgs::default())?]),
        ([], names) => {
            let named = |name: &String| ModelArgs { name: Some(name.clone()), ..ModelArgs::default() };
            names.iter().map(|name| Selected::for_files(app, &named(name))).collect()
        }
        (configs, []) => configs.iter().map(|config| model(config, None)).collect(),
        ([config], names) => names.iter().map(|name| model(config, Some(name))).collect(),
        _ => Err(Failure::usage(
            "--name chooses among the models of one configuration; several of --model take the default model of each",
        )),
    }
}

fn inputs(args: &ConformanceArgs) -> Outcome<Inputs> {
    let mut inputs = Inputs::default();
    inputs.positions = args.positions;
    inputs.answer_tokens = args.answer_tokens;
    if let Some(path) = &args.text {
        inputs.document = Some(TextSource::new(None, Some(path)).read("document")?);
    }
    Ok(inputs)
}

fn print(app: &App, one: &Compared) -> Outcome {
    let title = |info: &ModelInfo| format!("{} ({} on {})", info.name, info.format, info.backend);
    app.output.line(&format!(
        "{} against {}",
        title(&one.difference.model),
        title(&one.difference.reference)
    ))?;
    for finding in &one.findings {
        let verdict = if finding.passed { "pass" } else { "FAIL" };
        app.output
            .line(&format!("{verdict}  {:29} {:26} {}", finding.what, finding.found, finding.allowed))?;
    }
    app.output.line("")
}

fn write_page(app: &App, path: &Path, compared: &[Compared], passed: bool) -> Outcome {
    #[derive(Serialize)]
    struct Entry<'a> {
        passed: bool,
        model: &'a ModelInfo,
        findings: &'a [Finding],
        plots: Vec<String>,
    }
    let entries: Vec<Entry> = compared
        .iter()
        .map(|one| Entry {
            passed: one.passed,
            model: &one.difference.model,
            findings: &one.findings,
            plots: plots(one),
        })
        .collect();
    let page = Environment::new().render_named_str(
        "conformance.html",
        PAGE,
        Value::from(Serde(&serde_json::json!({
            "passed": passed,
            "reference": compared.first().map(|one| &one.difference.reference),
            "comparisons": entries,
            "version": env!("CARGO_PKG_VERSION"),
            "date": jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        }))),
    );
    let page =
        page.map_err(|e| ternion::Error::backend("the page cannot be written as HTML").with_source(e))?;
    write_atomically(&app.interrupts, path, |temporary| std::fs::write(temporary, page))
}

/// None without the feature that draws them.
#[cfg(not(feature = "plots"))]
fn plots(_: &Compared) -> Vec<String> {
    Vec::new()
}

#[cfg(feature = "plots")]
fn plots(one: &Compared) -> Vec<String> {
    let Some(logits) = &one.difference.logits else { return Vec::new() };
    let series = |name: &str, value: &dyn Fn(usize) -> f64| Series {
        name: name.to_owned(),
        points: (0..logits.positions.len()).map(|i| (i as f64, value(i))).collect(),
        ..Series::default()
    };
    let plot = |title: &str, y, series, limits| Plot {
        title: title.to_owned(),
        x: "position",
        y,
        log: true,
        series,
        limits,
    };
    let differences = vec![
        series("largest", &|i| f64::from(logits.positions[i].max)),
        series("mean", &|i| logits.positions[i].mean),
    ];
    let allowed = |value: f64| vec![("allowed".to_owned(), value)];
    [
        plot(
            "Difference of logits",
            "absolute difference",
            differences,
            allowed(f64::from(one.tolerances.max_logit)),
        ),
        plot(
            "Divergence of the next token's distribution",
            "KL, nats",
            vec![series("KL", &|i| logits.positions[i].kl)],
            vec![("allowed on average".to_owned(), one.tolerances.mean_kl)],
        ),
    ]
    .iter()
    .filter_map(Plot::svg)
    .collect()
}
