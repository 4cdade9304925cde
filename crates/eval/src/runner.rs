//! Runs the items of a task on a model, several at once, and keeps what comes out.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use ternion_core::{Error, ErrorKind, Result, ResultExt};
use tokio_util::sync::CancellationToken;

use crate::{
    gsm8k, mmlu,
    model::{Fingerprint, Model},
    perplexity,
    records::{Header, Outcome, Record, Records},
    task::{DataId, Document, Item, Task, TaskId, Work},
};

/// Is told how far a run is.
pub type OnProgress = Box<dyn Fn(&Progress) + Send + Sync>;

/// How a task is run. None of it changes the results, but for the rounding of backends without the capability
/// `batch_invariant`, which can turn an item whose best answers are almost equally probable.
#[derive(Default)]
#[non_exhaustive]
pub struct RunOptions {
    /// Write a record of each item here as it ends, and take over those that are there.
    pub records: Option<PathBuf>,
    /// Items at the same time; `None` takes as many as the model has sequences.
    pub concurrency: Option<usize>,
    /// Ends the run; what is done by then is evaluated.
    pub cancel: CancellationToken,
    /// Called after each item.
    pub progress: Option<OnProgress>,
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Items that are done, those of an earlier run included.
    pub done: usize,
    /// Items of the earlier run.
    pub resumed: usize,
    /// Items in all.
    pub total: usize,
    /// The result so far: `acc 47.3 %`.
    pub so_far: String,
}

/// What came out of a run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Evaluation {
    /// The task and its settings.
    pub task: TaskId,
    /// The data.
    pub data: DataId,
    /// The model.
    pub model: Fingerprint,
    /// The texts of the perplexity task.
    pub documents: Vec<Document>,
    /// Tokens that each of them has to be scored.
    pub document_tokens: Vec<usize>,
    /// The records of the items that are done, in the order of the items.
    pub records: Vec<Record>,
    /// Items in all.
    pub total: usize,
    /// The run was cancelled before its end.
    pub interrupted: bool,
    /// The time it took, without that of an earlier run.
    pub time: Duration,
}

/// Runs all items of the task that have no record yet.
///
/// # Errors
/// Those of the backend and of the task for an item, which its message names; [`Io`](ErrorKind::Io) where a record cannot
/// be written; [`InvalidRequest`](ErrorKind::InvalidRequest) where the records are of another run. What was recorded before
/// stays, and the same call goes on from there.
///
/// # Cancellation
/// With the token the run ends soon and returns what is done. Dropping the future ends it as well.
pub async fn evaluate(model: &Model, task: &Task, options: RunOptions) -> Result<Evaluation> {
    run(model, task, options).await.with_operation(task.id().name.name())
}

async fn run(model: &Model, task: &Task, options: RunOptions) -> Result<Evaluation> {
    let started = Instant::now();
    let items = task.items(model)?;
    let fingerprint = model.fingerprint().await?;
    let header = Header::new(task.id.clone(), task.data.clone(), fingerprint);
    let mut file = options.records.as_deref().map(|path| Records::open(path, &header)).transpose()?;
    let mut found: Vec<Option<Record>> = match &mut file {
        Some(file) => items.iter().map(|item| file.take(&item.id)).collect(),
        None => vec![None; items.len()],
    };
    let mut tally = Tally::default();
    found.iter().flatten().for_each(|record| tally.add(record));
    let resumed = tally.done;
    let report = |tally: &Tally| {
        if let Some(progress) = &options.progress {
            progress(&Progress { done: tally.done, resumed, total: items.len(), so_far: tally.so_far() });
        }
    };
    report(&tally);

    let pending: Vec<usize> = (0..items.len()).filter(|&i| found[i].is_none()).collect();
    let cancel = &options.cancel;
    {
        let mut results = stream::iter(pending)
            .take_while(|_| std::future::ready(!cancel.is_cancelled()))
            .map(|i| {
                let item = &items[i];
                async move { (i, one(model, &task.id, item, cancel).await) }
            })
            .buffer_unordered(concurrency(model, options.concurrency)?);
        while let Some((i, result)) = results.next().await {
            match result {
                Ok(record) => {
                    if let Some(file) = &mut file {
                        file.append(&record)?;
                    }
                    tally.add(&record);
                    found[i] = Some(record);
                    report(&tally);
                }
                Err(e) if e.kind() == ErrorKind::Cancelled && cancel.is_cancelled() => {}
                Err(e) => return Err(e.with("item", &items[i].id)),
            }
        }
    }
    let document_tokens =
        task.documents.iter().map(|d| items.iter().filter(|i| i.group == d.name).map(scored).sum()).collect();
    Ok(Evaluation {
        task: header.task,
        data: header.data,
        model: header.model,
        documents: task.documents.clone(),
        document_tokens,
        interrupted: found.iter().any(Option::is_none),
        records: found.into_iter().flatten().collect(),
        total: items.len(),
        time: started.elapsed(),
    })
}

async fn one(model: &Model, task: &TaskId, item: &Item, cancel: &CancellationToken) -> Result<Record> {
    match &item.work {
        Work::Generate { prompt, gold, cot } => {
            gsm8k::answer(model, task, item, (prompt, gold, *cot), cancel).await
        }
        Work::Choose { prompt, gold } => mmlu::choose(model, task, item, prompt, *gold, cancel).await,
        Work::Score { tokens, start, added } => {
            perplexity::score(model, item, (tokens, *start, *added), cancel).await
        }
    }
}

/// The text's own tokens that an item scores.
fn scored(item: &Item) -> usize {
    match &item.work {
        Work::Score { tokens, start, added } => (tokens.len() - start).saturating_sub(*added),
        Work::Generate { .. } | Work::Choose { .. } => 0,
    }
}

/// How many items run at the same time: no more than the backend accepts.
fn concurrency(model: &Model, wanted: Option<usize>) -> Result<usize> {
    let limits = &model.info.limits;
    if wanted == Some(0) {
        return Err(Error::invalid_request("concurrency: 0 is out of range; at least 1 expected"));
    }
    let accepted = limits.max_sequences.saturating_add(limits.max_queued).max(1);
    Ok(wanted.unwrap_or(limits.max_sequences.max(1)).min(accepted))
}

/// The result so far.
#[derive(Default)]
struct Tally {
    done: usize,
    right: usize,
    tokens: usize,
    loglikelihood: f64,
}

impl Tally {
    fn add(&mut self, record: &Record) {
        self.done += 1;
        match &record.outcome {
            Outcome::Generated { flexible_match, .. } => self.right += usize::from(*flexible_match),
            Outcome::Chosen { choice, gold, .. } => self.right += usize::from(choice == gold),
            Outcome::Scored { tokens, loglikelihood, added_tokens, added_loglikelihood } => {
                self.tokens += tokens - added_tokens.min(tokens);
                self.loglikelihood += loglikelihood - added_loglikelihood;
            }
        }
    }

    fn so_far(&self) -> String {
        if self.tokens > 0 {
            format!("perplexity {:.3}", (-self.loglikelihood / self.tokens as f64).exp())
        } else if self.done > 0 {
            format!("{:.1} % right", 100.0 * self.right as f64 / self.done as f64)
        } else {
            String::new()
        }
    }
}
