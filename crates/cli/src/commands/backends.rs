//! Which backends run a model, and why the others do not.

use serde_json::{Value, json};
use ternion::registry::Suitability;
use ternion::{Error, formats::gguf::Overview};

use crate::failure::Outcome;
use crate::model::Selected;

/// What each backend says of a model.
pub(super) struct Backends {
    /// The best first, which `backend = "auto"` takes.
    able: Vec<(&'static str, Suitability)>,
    refused: Vec<(&'static str, Error)>,
    /// Backends that are not compiled in.
    missing: Vec<&'static str>,
}

impl Backends {
    pub(super) fn of(selected: &Selected) -> Outcome<Self> {
        let mut all =
            Self { able: Vec::new(), refused: Vec::new(), missing: ternion::missing_backends().collect() };
        for (name, judgement) in ternion::suitability(&selected.config, Some(&selected.name))? {
            match judgement {
                Ok(suitability) => all.able.push((name, suitability)),
                Err(error) => all.refused.push((name, error)),
            }
        }
        Ok(all)
    }

    /// The rows of a table. `overview`: the model lies in this GGUF file, of which is known whether llama.cpp may run it.
    pub(super) fn rows(&self, overview: Option<&Overview>) -> Vec<(String, String)> {
        let mut able: Vec<String> = self
            .able
            .iter()
            .map(|(name, suitability)| match suitability {
                Suitability::Limited => format!("{name} (with limits)"),
                _ => (*name).to_owned(),
            })
            .collect();
        if self.missing.contains(&"llama-cpp") && overview.is_some_and(|o| o.llama_cpp_error.is_none()) {
            able.push("the backend llama-cpp (cargo feature `llama-cpp`)".to_owned());
        }
        let runs = if able.is_empty() { "none that is compiled in".to_owned() } else { able.join(", ") };
        let mut rows = vec![("runs with".to_owned(), runs)];
        rows.extend(self.refused.iter().map(|(name, error)| ((*name).to_owned(), format!("no: {error}"))));
        if !self.missing.is_empty() {
            rows.push(("not built in".to_owned(), format!("{} (cargo features)", self.missing.join(", "))));
        }
        rows
    }

    pub(super) fn json(&self) -> Value {
        let able = self.able.iter().map(|(name, s)| json!({"backend": name, "suitability": s.as_str()}));
        let refused = self.refused.iter().map(|(name, e)| json!({"backend": name, "error": e.to_string()}));
        json!({"runs_with": able.collect::<Value>(), "refused_by": refused.collect::<Value>(), "not_compiled_in": self.missing})
    }
}
