//! What all models of a comparison are asked.

use ternion_core::{Error, LlmBackend, Message, Result, ResultExt};

/// No sequence whose logits are compared is longer, so that the positions come from texts of several kinds.
const LONGEST: usize = 64;

/// Texts that tokenizers cut in different ways when one of them is wrong.
const TEXTS: &[&str] = &[
    "The quick brown fox jumps over the lazy dog. It doesn't care: 3.14159 is close to 22/7, and 1234567 > 98765.",
    "fn main() {\n    let x = vec![1, 2, 3];\n\tprintln!(\"{x:?}\");\n}\n\n\n// the end   ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — „endlich“, sagte er.",
    "Широкая электрификация южных губерний даст мощный толчок подъёму сельского хозяйства.",
    "我能吞下玻璃而不伤身体。こんにちは、世界！ 안녕하세요 세계",
    "نص حكيم له سر قاطع وذو شأن عظيم، ऋषियों को सताने वाले दुष्ट राक्षसों के राजा, กขฃคฅฆงจฉช",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u{301} = é, ﬁ, Ω, ½, x²\u{200b}y, \u{feff}BOM, tab\tand\r\nlines \u{a0}",
    "A <|eot_id|> in a text, a </s>, a <|begin_of_text|> and an <unk> are no control tokens.",
    "      indented, then  two   three    spaces, and aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// What a comparison is made of. The default asks for everything but the perplexity of a document.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Inputs {
    /// Texts to be encoded, and to compare logits on.
    pub texts: Vec<String>,
    /// Conversations to be rendered and encoded, and to be answered greedily.
    pub chats: Vec<Vec<Message>>,
    /// A document whose perplexity is computed.
    pub document: Option<String>,
    /// The most positions to compare logits at.
    pub positions: usize,
    /// Tokens of each greedy answer.
    pub answer_tokens: usize,
    /// Tokens of one window of the document: each token but the first of a window is scored, given those before it in
    /// the window.
    pub window: usize,
}

impl Default for Inputs {
    fn default() -> Self {
        let user = |text: &str| vec![Message::user(text)];
        Self {
            texts: TEXTS.iter().map(|&text| text.to_owned()).collect(),
            chats: vec![
                user("How many days are in a week?"),
                vec![
                    Message::system("Answer in one sentence."),
                    Message::user("What is 3 + 4?"),
                    Message::assistant("3 + 4 is 7."),
                    Message::user("And\n\n  twice as much?  "),
                ],
                user("Repeat: <|eot_id|>Assistant: 你好 👋"),
            ],
            document: None,
            positions: 128,
            answer_tokens: 32,
            window: 512,
        }
    }
}

/// The inputs as the reference's tokens. What a model cannot be asked is left out.
#[derive(Debug, Clone)]
pub struct Questions {
    pub(super) inputs: Inputs,
    /// Sequences whose logits are compared, each with as many positions as tokens.
    pub(super) sequences: Vec<Vec<u32>>,
    /// Prompts that are answered greedily.
    pub(super) prompts: Vec<Vec<u32>>,
    /// Windows of the document.
    pub(super) windows: Vec<Vec<u32>>,
    pub(super) vocab_size: usize,
}

impl Questions {
    /// The questions to ask this model and those that are compared with it.
    ///
    /// # Errors
    /// [`Unsupported`](ternion_core::ErrorKind::Unsupported) for a model without a tokenizer on this side,
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a text that it cannot encode or a window below 2 tokens.
    pub fn for_model(reference: &dyn LlmBackend, inputs: &Inputs) -> Result<Self> {
        Self::build(reference, inputs).with_operation("compare")
    }

    fn build(reference: &dyn LlmBackend, inputs: &Inputs) -> Result<Self> {
        let info = reference.info();
        let Some(tokenizer) = reference.tokenizer() else {
            return Err(Error::unsupported(
                "the reference has no tokenizer on this side, so nothing can be compared",
            )
            .with("model", &info.name));
        };
        if inputs.window < 2 {
            return Err(Error::invalid_request(format!(
                "a window of {} tokens leaves none to score; at least 2 expected",
                inputs.window
            )));
        }
        let context = info.limits.context_length;
        let texts =
            inputs.texts.iter().map(|text| tokenizer.encode(text, true)).collect::<Result<Vec<_>>>()?;
        let chats = if info.capabilities.chat {
            inputs.chats.iter().map(|chat| tokenizer.encode_chat(chat, true)).collect::<Result<Vec<_>>>()?
        } else {
            Vec::new()
        };

        let mut left = inputs.positions;
        let mut sequences = Vec::new();
        for tokens in chats.iter().chain(&texts) {
            let count = tokens.len().min(LONGEST).min(context).min(left);
            if count > 0 {
                sequences.push(tokens[..count].to_vec());
                left -= count;
            }
        }
        // Without a chat template the texts are continued.
        let prompts = if chats.is_empty() { texts } else { chats };
        let prompts = prompts.into_iter().filter(|p| !p.is_empty() && p.len() < context).collect();
        let document =
            inputs.document.as_deref().map_or(Ok(Vec::new()), |text| tokenizer.encode(text, true))?;
        let window = inputs.window.min(context).max(2);
        let windows = document.chunks(window).filter(|w| w.len() >= 2).map(<[u32]>::to_vec).collect();
        Ok(Self { inputs: inputs.clone(), sequences, prompts, windows, vocab_size: info.limits.vocab_size })
    }
}
