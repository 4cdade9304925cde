//! `ternion eval`: how good a model's answers are, and whether those of two models differ.

use std::path::PathBuf;

use serde::Serialize;
use ternion_eval::{Comparison, Evaluation, Model, Report, RunOptions, Task, evaluate};

use super::load;
use crate::App;
use crate::args_eval::EvalArgs;
use crate::failure::{Failure, Outcome};
use crate::model::Selected;

/// Two models and what their difference is.
#[derive(Serialize)]
struct Compared {
    a: Report,
    b: Report,
    comparison: Comparison,
}

pub(crate) async fn run(app: &App, args: &EvalArgs) -> Outcome {
    let (kind, settings) = args.task()?;
    // What is wrong with either model or the data is said before anything is computed.
    let models =
        args.models()?.iter().map(|args| Selected::for_engine(app, args)).collect::<Outcome<Vec<_>>>()?;
    let task = super::blocking(app, || Task::open(kind, &args.data, &settings))?;
    let mut runs = Vec::new();
    for (i, selected) in models.iter().enumerate() {
        let model = Model::new(load(app, selected).await?)?;
        let run = measure(app, args, &model, &task, args.records.get(i).cloned()).await?;
        let interrupted = run.interrupted;
        runs.push(run);
        if interrupted {
            break;
        }
    }
    let interrupted = runs.iter().any(|run| run.interrupted);
    if let [a, b] = runs.as_slice() {
        compare(app, a, b)?;
    } else {
        for run in &runs {
            let report = Report::new(run);
            if app.output.json { app.output.object(&report)? } else { app.output.line(&report.text())? }
        }
    }
    if interrupted { Err(Failure::Interrupted) } else { Ok(()) }
}

/// Runs the task with a bar that shows the result so far and the time left.
async fn measure(
    app: &App,
    args: &EvalArgs,
    model: &Model,
    task: &Task,
    records: Option<PathBuf>,
) -> Outcome<Evaluation> {
    let bar = app.output.evaluation();
    let shown = bar.clone();
    let mut options = RunOptions::default();
    options.records = records;
    options.concurrency = args.concurrency;
    options.cancel = app.interrupts.renew();
    options.progress = Some(Box::new(move |p| {
        shown.set(p.done as u64, p.total as u64);
        if p.done == p.resumed {
            shown.begin_here();
        }
        shown.message(p.so_far.clone());
    }));
    let run = evaluate(model, task, options).await;
    bar.clear();
    app.interrupts.idle();
    Ok(run?)
}

fn compare(app: &App, a: &Evaluation, b: &Evaluation) -> Outcome {
    let (report_a, report_b) = (Report::new(a), Report::new(b));
    let comparison = Comparison::new(a, b)?;
    if app.output.json {
        return app.output.object(&Compared { a: report_a, b: report_b, comparison });
    }
    app.output.line(&format!("{}\n\n{}\n\n{}", report_a.text(), report_b.text(), comparison.text()))
}
