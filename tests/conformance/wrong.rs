//! A wrapper around a right backend that does one thing wrong.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use async_trait::async_trait;
use futures_core::Stream;
use ternion::{
    BackendWrapper, DoneEvent, Event, FinishReason, GenerateRequest, GenerateStream, LlmBackend, Prompt,
    Result, TextEvent, Timing, Usage,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// Conversations get a second BOS.
    DoubleBos,
    /// Special tokens in messages are control tokens.
    TrustedMessages,
    /// Stop strings are looked for in each piece alone.
    StopWithinTokens,
    /// Every answer is drawn with a new seed.
    SeedIgnored,
    /// The work goes on when nobody listens.
    DropIgnored,
    /// The request's token is not looked at.
    CancelIgnored,
    /// One token too many in the usage.
    UsageOffByOne,
    /// What is held back does not come at the end.
    LastPieceLost,
    /// `Done` twice.
    TwoEnds,
    /// Log-probabilities of another temperature.
    ScaledLogprobs,
    /// A negative temperature is taken for 0.
    TemperatureClamped,
    /// Every temperature is 1.
    TemperatureIgnored,
    /// All tokens are kept.
    FiltersIgnored,
    /// A request waits until the stream before it is gone.
    OneAtATime,
}

pub(crate) struct Wrong {
    inner: Arc<dyn LlmBackend>,
    fault: Fault,
    turn: Arc<Semaphore>,
}

impl Wrong {
    pub(crate) fn new(inner: Arc<dyn LlmBackend>, fault: Fault) -> Self {
        Self { inner, fault, turn: Arc::new(Semaphore::new(1)) }
    }

    fn alter(&self, request: &mut GenerateRequest) {
        let tokenizer = self.inner.tokenizer().unwrap();
        match (self.fault, &request.params.prompt) {
            (Fault::DoubleBos, Prompt::Chat(messages)) if !messages.is_empty() => {
                let mut tokens = vec![tokenizer.bos_id().unwrap()];
                tokens.extend(tokenizer.encode_chat(messages, true).unwrap());
                request.params.prompt = Prompt::Tokens(tokens);
            }
            (Fault::TrustedMessages, Prompt::Chat(messages)) if !messages.is_empty() => {
                let text = tokenizer.render_chat(messages, true).unwrap();
                request.params.prompt = Prompt::Text(text);
            }
            (Fault::StopWithinTokens, _) if request.params.stop.iter().all(|stop| !stop.is_empty()) => {
                request.params.stop.clear();
            }
            (Fault::SeedIgnored, _) => request.params.sampling.seed = None,
            (Fault::CancelIgnored, _) => request.cancel = GenerateRequest::new("").cancel,
            (Fault::TemperatureClamped, _) => {
                request.params.sampling.temperature = request.params.sampling.temperature.map(|t| t.max(0.0));
            }
            (Fault::TemperatureIgnored, _) => {
                let temperature = &mut request.params.sampling.temperature;
                *temperature = temperature.map(|t| if t > 0.0 && t.is_finite() { 1.0 } else { t });
            }
            (Fault::FiltersIgnored, _) => {
                let sampling = &mut request.params.sampling;
                sampling.top_k = sampling.top_k.map(|_| 0);
                sampling.top_p = sampling.top_p.map(|p| if p > 0.0 { p.max(1.0) } else { p });
                sampling.min_p = sampling.min_p.map(|p| if p <= 1.0 { p.min(0.0) } else { p });
            }
            _ => {}
        }
    }
}

#[async_trait]
impl BackendWrapper for Wrong {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.inner
    }

    async fn validate(&self, request: &GenerateRequest) -> Result<()> {
        let mut request = request.clone();
        self.alter(&mut request);
        self.inner.validate(&request).await
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream> {
        let stops = request.params.stop.clone();
        self.alter(&mut request);
        let inner = self.inner.generate(request).await?;
        if self.fault == Fault::None {
            return Ok(inner);
        }
        if self.fault == Fault::DropIgnored {
            // Never ready at the first look, however soon the tokenizer is done: a future that is dropped then has no
            // stream yet whose drop could be ignored.
            tokio::task::yield_now().await;
        }
        let turn = match self.fault {
            Fault::OneAtATime => Turn::Waiting(Box::pin(Arc::clone(&self.turn).acquire_owned())),
            _ => Turn::Free,
        };
        Ok(GenerateStream::new(Events {
            inner: Some(inner),
            fault: self.fault,
            stops,
            queue: Vec::new(),
            kept: None,
            turn,
        }))
    }
}

enum Turn {
    Free,
    Waiting(Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, tokio::sync::AcquireError>> + Send>>),
    Taken { _permit: OwnedSemaphorePermit },
}

struct Events {
    /// `None` after the end.
    inner: Option<GenerateStream>,
    fault: Fault,
    stops: Vec<String>,
    /// Events to give before the inner stream's next one.
    queue: Vec<Event>,
    /// The last piece of text, which is not given yet.
    kept: Option<Event>,
    turn: Turn,
}

impl Events {
    fn alter(&mut self, event: &mut Event) {
        match (self.fault, &mut *event) {
            (Fault::UsageOffByOne, Event::Done(DoneEvent { usage, .. })) => usage.completion_tokens += 1,
            (Fault::ScaledLogprobs, Event::Token(token)) => token.logprob = token.logprob.map(|l| l * 0.5),
            (Fault::TwoEnds, Event::Done(_)) => self.queue.push(event.clone()),
            (Fault::StopWithinTokens, Event::Text(TextEvent { text, .. })) => {
                let found =
                    self.stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at, stop)));
                if let Some((at, stop)) = found.min_by_key(|&(at, stop)| (at + stop.len(), at)) {
                    text.truncate(at);
                    let reason = FinishReason::StopString(stop.clone());
                    self.queue.push(DoneEvent::new(reason, Usage::default(), Timing::default()).into());
                    self.inner = None;
                }
            }
            _ => {}
        }
    }
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Turn::Waiting(turn) = &mut this.turn {
            let permit = ready!(turn.as_mut().poll(cx)).unwrap();
            this.turn = Turn::Taken { _permit: permit };
        }
        if let Some(event) = this.queue.pop() {
            return Poll::Ready(Some(Ok(event)));
        }
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        let mut event = ready!(Pin::new(&mut *inner).poll_next(cx));
        if this.fault == Fault::LastPieceLost {
            // A piece is kept until the next event, and lost if that is the end.
            while let Some(Ok(piece @ Event::Text(_))) = event {
                if let Some(before) = this.kept.replace(piece) {
                    return Poll::Ready(Some(Ok(before)));
                }
                event = ready!(Pin::new(&mut *inner).poll_next(cx));
            }
            match event {
                Some(Ok(Event::Done(_))) => this.kept = None,
                Some(Ok(next)) if this.kept.is_some() => {
                    this.queue.push(next);
                    return Poll::Ready(this.kept.take().map(Ok));
                }
                _ => {}
            }
        }
        match &mut event {
            Some(Ok(event)) => this.alter(event),
            Some(Err(_)) => {}
            None => this.inner = None,
        }
        Poll::Ready(event)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.fault == Fault::DropIgnored {
            std::mem::forget(self.inner.take());
        }
    }
}
