//! Log-probabilities and rows of logits of given tokens.

use tokio::sync::oneshot;

use ternion_core::{Error, ErrorKind, Result, Score, TokenLogprob, TokenScore, logprob::log_sum_exp};

use crate::sampler::{argmax, check_finite};

/// The state of one scoring.
pub(crate) struct Scoring {
    pub(crate) result: oneshot::Sender<Result<Score>>,
    start: usize,
    /// The last token, which is scored but not fed.
    last: u32,
    top: usize,
    pub(crate) scores: Vec<TokenScore>,
}

impl Scoring {
    pub(crate) fn new(result: oneshot::Sender<Result<Score>>, start: usize, last: u32, top: usize) -> Self {
        Self { result, start, last, top, scores: Vec::new() }
    }

    /// The first position whose logits are not taken yet.
    pub(crate) fn next_row(&self) -> usize {
        self.start - 1 + self.scores.len()
    }

    /// Scores as many tokens as there are rows; `tokens` are those that are fed.
    pub(crate) fn take(&mut self, tokens: &[u32], logits: &[f32], vocab_size: usize) -> Result<()> {
        for row in logits.chunks_exact(vocab_size) {
            let id = tokens.get(self.start + self.scores.len()).copied().unwrap_or(self.last);
            check_finite(row)?;
            self.scores.push(score_token(row, id, self.top));
        }
        Ok(())
    }
}

fn score_token(row: &[f32], id: u32, top: usize) -> TokenScore {
    let normalizer = log_sum_exp(row);
    let own = row[id as usize];
    let rank = row.iter().enumerate().filter(|&(i, &l)| l > own || (l == own && (i as u32) < id)).count();
    TokenScore::new(id, logprob(own, normalizer), rank).with_top(top_tokens(row, normalizer, top))
}

/// The log-probability of a token with this logit, in a row with this [`log_sum_exp`].
pub(crate) fn logprob(logit: f32, normalizer: f64) -> f32 {
    (f64::from(logit) - normalizer) as f32
}

/// The `top` most probable tokens of a row of logits with this [`log_sum_exp`], best first.
pub(crate) fn top_tokens(row: &[f32], normalizer: f64, top: usize) -> Vec<TokenLogprob> {
    let mut best: Vec<u32> = Vec::new();
    if top == 1 {
        best.extend(argmax(row));
    } else if top > 1 {
        best = (0..row.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
        if top < best.len() {
            best.select_nth_unstable_by(top, by_logit);
            best.truncate(top);
        }
        best.sort_unstable_by(by_logit);
    }
    best.into_iter().map(|i| TokenLogprob::new(i, logprob(row[i as usize], normalizer))).collect()
}

/// The rows of logits that were asked for, as they come.
pub(crate) struct Rows {
    pub(crate) result: oneshot::Sender<Result<Vec<f32>>>,
    /// The first position whose logits are not taken yet.
    pub(crate) next_row: usize,
    pub(crate) rows: Vec<f32>,
}

impl Rows {
    pub(crate) fn new(result: oneshot::Sender<Result<Vec<f32>>>, start: usize) -> Self {
        Self { result, next_row: start, rows: Vec::new() }
    }

    /// Takes the memory of all rows at once: a vector that grows would abort the process where there is none, and
    /// would hold everything twice on the way.
    pub(crate) fn reserve(&mut self, length: usize, vocab_size: usize) -> Result<()> {
        let count = length - self.next_row;
        self.rows.try_reserve_exact(count.saturating_mul(vocab_size)).map_err(|e| {
            let message = format!("no memory for {count} rows of {vocab_size} logits; ask for fewer");
            Error::new(ErrorKind::ResourceExhausted, message).with_source(e)
        })
    }

    pub(crate) fn take(&mut self, logits: &[f32], vocab_size: usize) {
        self.rows.extend_from_slice(logits);
        self.next_row += logits.len() / vocab_size;
    }
}
