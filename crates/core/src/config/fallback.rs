//! Which models stand in for which: the lists `fallback` of all models together.

use std::collections::{BTreeMap, HashSet};

use super::{Config, ModelConfig, suggest};
use crate::{Error, Result};

/// The most models that one chain may have, the first included.
const LONGEST: usize = 32;

impl Config {
    /// The model called `name` and then those that stand in for it, in the order in which they are tried: each model
    /// of its `fallback` is followed by that one's own, and none comes twice.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) if a model of the chain does not exist.
    pub fn chain(&self, name: &str) -> Result<Vec<&str>> {
        let (name, _) = self.model(Some(name))?;
        let chain = chain(&self.models, name);
        chain.iter().try_for_each(|name| self.model(Some(name)).map(|_| ()))?;
        Ok(chain)
    }
}

/// The chain of a model, as far as it is followed: to one model more than it may have.
fn chain<'a>(models: &'a BTreeMap<String, ModelConfig>, name: &'a str) -> Vec<&'a str> {
    let mut chain = Vec::new();
    let mut next = vec![name];
    while let Some(name) = next.pop()
        && chain.len() <= LONGEST
    {
        if !chain.contains(&name) {
            chain.push(name);
            let own = models.get(name).into_iter().flat_map(|model| model.fallback.iter().rev());
            next.extend(own.map(String::as_str));
        }
    }
    chain
}

/// Checks that every name exists, none stands twice in a list, and none leads back to where it came from.
pub(super) fn validate(models: &BTreeMap<String, ModelConfig>) -> Result<()> {
    for (name, model) in models {
        let place = format!("models.{name}.fallback");
        let mut seen = HashSet::new();
        for other in &model.fallback {
            if !models.contains_key(other) {
                let known = || models.keys().map(String::as_str);
                let mut message = format!(
                    "{place}: no model `{other}`; configured: {}",
                    known().collect::<Vec<_>>().join(", ")
                );
                suggest(&mut message, other, known().filter(|k| k != name));
                return Err(Error::invalid_config(message));
            }
            if other == name {
                return Err(Error::invalid_config(format!("{place}: names the model itself")));
            }
            if !seen.insert(other) {
                return Err(Error::invalid_config(format!("{place}: names `{other}` twice")));
            }
        }
    }
    if let Some(cycle) = find_cycle(models) {
        let first = cycle[0];
        let message =
            format!("models.{first}.fallback: leads back to the model itself: {}", cycle.join(" -> "));
        return Err(Error::invalid_config(message));
    }
    match models.keys().find(|name| chain(models, name).len() > LONGEST) {
        None => Ok(()),
        Some(name) => Err(Error::invalid_config(format!(
            "models.{name}.fallback: more than {LONGEST} models one after the other; expected at most that many"
        ))),
    }
}

/// A round trip along the lists, its start at both ends.
fn find_cycle(models: &BTreeMap<String, ModelConfig>) -> Option<Vec<&str>> {
    // Models whose lists end are taken away one after the other; what is left goes around.
    let mut open: BTreeMap<&str, usize> =
        models.iter().map(|(name, model)| (name.as_str(), model.fallback.len())).collect();
    let mut named_by: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, model) in models {
        for other in &model.fallback {
            named_by.entry(other).or_default().push(name);
        }
    }
    let mut ending: Vec<&str> =
        open.iter().filter(|(_, count)| **count == 0).map(|(name, _)| *name).collect();
    while let Some(name) = ending.pop() {
        for before in named_by.get(name).into_iter().flatten() {
            if let Some(count) = open.get_mut(before) {
                *count -= 1;
                if *count == 0 {
                    ending.push(before);
                }
            }
        }
    }
    let left = |name: &str| open.get(name).is_some_and(|count| *count > 0);
    let mut name = open.keys().copied().find(|name| left(name))?;
    let mut path = Vec::new();
    let mut place = BTreeMap::new();
    loop {
        if let Some(start) = place.insert(name, path.len()) {
            path.drain(..start);
            path.push(name);
            return Some(path);
        }
        path.push(name);
        name = models.get(name)?.fallback.iter().map(String::as_str).find(|other| left(other))?;
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Format};

    fn config(lists: &[(&str, &[&str])]) -> crate::Result<Config> {
        let mut text = String::new();
        for (name, fallback) in lists {
            text += &format!("[models.{name}]\nbackend = \"echo\"\nfallback = {fallback:?}\n");
        }
        Config::from_str(&text, Format::Toml)
    }

    #[test]
    fn a_chain_follows_each_model_with_its_own() {
        let config = config(&[("a", &["b", "c"]), ("b", &["d", "c"]), ("c", &[]), ("d", &["c"])]).unwrap();
        assert_eq!(config.chain("a").unwrap(), ["a", "b", "d", "c"]);
        assert_eq!(config.chain("c").unwrap(), ["c"]);
        assert!(config.chain("e").is_err());
    }

    #[test]
    fn lists_that_lead_nowhere_or_back_are_refused() {
        for (lists, expected) in [
            (&[("alpha", &["alpa"][..]), ("alphas", &[])][..], "no model `alpa`"),
            (&[("alpha", &["alphs"]), ("alphas", &[])], "did you mean `alphas`?"),
            (&[("a", &["a"])], "models.a.fallback: names the model itself"),
            (&[("a", &["b", "b"]), ("b", &[])], "models.a.fallback: names `b` twice"),
            (
                &[("a", &["b"]), ("b", &["c"]), ("c", &["d"]), ("d", &["b"])],
                "models.b.fallback: leads back to the model itself: b -> c -> d -> b",
            ),
        ] {
            let error = config(lists).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_chain_has_a_bounded_length() {
        let of_length = |length: usize| {
            let models = (0..length).map(|i| {
                let next = if i + 1 < length { format!("\"m{}\"", i + 1) } else { String::new() };
                format!("[models.m{i}]\nfallback = [{next}]\n")
            });
            Config::from_str(&models.collect::<String>(), Format::Toml)
        };
        assert_eq!(of_length(32).unwrap().chain("m0").unwrap().len(), 32);
        for length in [33, 5000] {
            let error = of_length(length).unwrap_err().to_string();
            assert!(error.contains("models.m0.fallback: more than 32 models"), "{error}");
        }
    }
}
