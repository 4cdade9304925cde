//! A model on a server, as an [`LlmBackend`].

use std::{collections::VecDeque, sync::Arc, time::Instant};

use bytes::Bytes;
use ternion_core::{
    CancellationToken, Error, GenerateRequest, GenerateStream, LlmBackend, ModelInfo, Result, ResultExt,
    Sampling, Score, ScoreRequest, ServedBy, Stats,
    answer::{AnswerFormat, AnswerParser, Thought},
    async_trait,
    text::Tokenizer,
    validate,
};

use crate::{
    admission::{Admission, Place},
    answer::{Answer, Question},
    body::{self, Common, Input, Wanted},
    client::Client,
    constraint::Kept,
    probe::{Echo, Endpoint, IdSource, Scoring},
    prompt::{Preparation, Prepared},
    score,
    stream::Job,
};

/// A model on a server.
pub(crate) struct RemoteModel {
    pub(crate) info: Arc<ModelInfo>,
    pub(crate) client: Arc<Client>,
    pub(crate) common: Common,
    pub(crate) preparation: Preparation,
    pub(crate) admission: Arc<Admission>,
    /// What the configuration says where a request is open.
    pub(crate) sampling: Sampling,
    /// The forms of thoughts and calls that the configuration names.
    pub(crate) answers: AnswerFormat,
    /// Whether token ids are asked for with every answer.
    pub(crate) token_ids: bool,
}

/// A request as it goes to the server.
struct Outgoing {
    prepared: Prepared,
    body: Bytes,
    seed: Option<u64>,
    ids: IdSource,
}

impl RemoteModel {
    fn endpoint(&self, input: &Input) -> Endpoint {
        match input {
            Input::Chat(_) => self.preparation.abilities.chat,
            Input::Text(_) | Input::Tokens(_) => self.preparation.abilities.completions,
        }
    }

    /// Checks a request and writes it down.
    async fn outgoing(&self, request: &GenerateRequest) -> Result<Outgoing> {
        let params = &request.params;
        let prepared = self.preparation.prepare(request, &self.info, &self.client, &self.common).await?;
        let endpoint = self.endpoint(&prepared.input);
        if params.logprobs && !endpoint.logprobs {
            return Err(Error::unsupported("logprobs: the server gives none with token ids for this prompt"));
        }
        let ids = match endpoint.ids {
            IdSource::Logprobs if !self.token_ids && !params.logprobs && params.stop_tokens.is_empty() => {
                IdSource::None
            }
            ids => ids,
        };
        let sampling = params.sampling.clone().or(&self.sampling);
        let seed = self.seed(&sampling);
        let room = prepared.tokens.filter(|_| self.info.limits.context_length > 0);
        let room = room.map(|tokens| self.info.limits.context_length.saturating_sub(tokens));
        let max_tokens = match (params.max_tokens, room) {
            // What the template adds to a conversation is the server's to know.
            (None, _) if matches!(prepared.input, Input::Chat(_)) => None,
            (None, room) => room,
            (Some(most), room) => Some(most.min(room.unwrap_or(most))),
        };
        let wanted = Wanted {
            params,
            sampling: &sampling,
            max_tokens,
            ids,
            seed: seed.or(sampling.seed).map(wire_seed),
            constraints: endpoint.constraints,
        };
        let body = body::generation(&self.common, &prepared.input, &wanted)?;
        Ok(Outgoing { prepared, body: body.to_string().into(), seed, ids })
    }

    /// The seed of an answer that is drawn, which is reported: the request's, else one that is drawn here.
    fn seed(&self, sampling: &Sampling) -> Option<u64> {
        let drawn = sampling.temperature.unwrap_or(self.info.defaults.temperature) > 0.0;
        (drawn && self.info.capabilities.seed)
            .then(|| sampling.seed.unwrap_or_else(|| u64::from(fastrand::u32(..1 << 31))))
    }

    /// The parser of an answer. A server that is asked for a conversation tells thoughts and calls itself, but for what the
    /// configuration says.
    fn parser(&self, request: &GenerateRequest, input: &Input) -> Result<AnswerParser> {
        let params = &request.params;
        match (input, &self.preparation.tokenizer) {
            (Input::Tokens(tokens), Some(tokenizer)) => AnswerParser::for_request(params, tokenizer, tokens),
            (Input::Chat(_), _) => {
                Ok(AnswerParser::new(&self.answers, params.chat.offered_tools(), Thought::Possible))
            }
            _ => Ok(AnswerParser::plain()),
        }
    }

    fn answer(&self, request: &GenerateRequest, outgoing: &Outgoing, accepted: Instant) -> Result<Answer> {
        let params = &request.params;
        let tokenizer = self.preparation.tokenizer.as_ref();
        // Text is decoded here only if every token is known here.
        let decoder = tokenizer.filter(|_| outgoing.prepared.decoded && outgoing.ids != IdSource::None);
        Ok(Answer::new(Question {
            accepted,
            prompt_tokens: outgoing.prepared.tokens,
            max_tokens: params.max_tokens,
            context_length: self.info.limits.context_length,
            stop: params.stop.clone(),
            stop_tokens: if outgoing.ids == IdSource::None { Vec::new() } else { params.stop_tokens.clone() },
            ignore_eos: params.ignore_eos,
            end_tokens: self.info.end_tokens.clone(),
            logprobs: params.logprobs,
            top_logprobs: params.top_logprobs,
            decoder: decoder.map(Tokenizer::decoder),
            parser: self.parser(request, &outgoing.prepared.input)?,
            kept: params.constraint.as_ref().map(Kept::new).transpose()?,
            seed: outgoing.seed,
            prefix_reuse: self.info.capabilities.prefix_reuse,
            served_by: ServedBy::from(&*self.info),
        }))
    }

    async fn start(&self, request: GenerateRequest) -> Result<GenerateStream> {
        let accepted = Instant::now();
        let place = self.admission.place()?;
        let outgoing = self.outgoing(&request).await?;
        let mut job = Job {
            client: Arc::clone(&self.client),
            url: self.client.api(outgoing.prepared.input.endpoint()),
            answer: self.answer(&request, &outgoing, accepted)?,
            body: outgoing.body,
            place,
            cancel: request.cancel,
            waits: self.client.waits(),
            response: None,
            pending: VecDeque::new(),
        };
        // A request that need not wait is sent at once, so that the server's refusal is this call's error.
        if !job.cancel.is_cancelled() && job.place.try_start() {
            job.answer.sent_now();
            let cancel = job.cancel.clone();
            let opened = tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                opened = self.client.open(&job.url, &job.body, &mut job.waits) => Some(opened?),
            };
            job.response = opened;
        }
        Ok(job.start())
    }

    /// A place at work, when it is this request's turn.
    async fn turn(&self) -> Result<Place> {
        let mut place = self.admission.place()?;
        place.start().await;
        Ok(place)
    }

    async fn scored(&self, request: &ScoreRequest) -> Result<Score> {
        let scoring = self.preparation.abilities.scoring;
        if scoring == Scoring::None {
            return Err(Error::unsupported("the server does not score"));
        }
        let mut limits = self.info.limits.clone();
        for limit in [&mut limits.vocab_size, &mut limits.context_length] {
            if *limit == 0 {
                *limit = usize::MAX; // not known on this side
            }
        }
        validate::score(request, &limits)?;
        if request.top > 0 && matches!(scoring, Scoring::Echo(Echo { with_ids: false, .. })) {
            return Err(Error::unsupported("top: the server gives alternatives without their token ids"));
        }
        let turn = self.turn().await?;
        let url = self.client.api("completions");
        let tokens = score::Tokens::new(&request.tokens, scoring, limits.context_length);
        let body = score::body(&self.common, scoring, tokens, request.top);
        let response = self.client.post(&url, &body).await?;
        let tokens = score::read(&response, scoring, tokens, request.start, request.top);
        let mut score = Score::new(tokens.map_err(|error| self.client.told(error, &url))?);
        score.served_by = Some(ServedBy::from(&*self.info));
        turn.count(&ternion_core::Usage::new(request.tokens.len(), 0));
        Ok(score)
    }
}

#[async_trait]
impl LlmBackend for RemoteModel {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.info)
    }

    fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.preparation.tokenizer.clone()
    }

    fn stats(&self) -> Stats {
        self.admission.stats()
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        request.params.constraint.as_ref().map(Kept::new).transpose().with_operation("generate")?;
        self.outgoing(request).await.map(drop).with_operation("generate")
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        self.start(request).await.with_operation("generate")
    }

    async fn score(&self, request: ScoreRequest) -> Result<Score> {
        let cancel: CancellationToken = request.cancel.clone();
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(Error::cancelled()),
            score = self.scored(&request) => score,
        }
        .with_operation("score")
    }
}

/// A seed that every server takes: below 2^31. Smaller ones stay what they are.
fn wire_seed(seed: u64) -> u32 {
    const MASK: u64 = (1 << 31) - 1;
    if seed <= MASK { seed as u32 } else { ((seed ^ (seed >> 31) ^ (seed >> 62)) & MASK) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_fit_into_every_server() {
        for seed in [0, 1, 42, (1 << 31) - 1] {
            assert_eq!(u64::from(wire_seed(seed)), seed);
        }
        let folded: Vec<u32> = [u64::MAX, u64::MAX - 1, 1 << 31, 1 << 53].map(wire_seed).to_vec();
        assert!(folded.iter().all(|seed| *seed < 1 << 31), "{folded:?}");
        assert_ne!(folded[0], folded[1]);
    }
}
