//! Which models stand in for which: the lists `fallback` of all models together.

use std::collections::{BTreeMap, HashSet};

use super::{Config, ModelConfig, suggest};
use crate::{Error, Result};

impl Config {
    /// The model called `name` and then those that stand in for it, in the order in which they are tried: each model
    /// of its `fallback` is followed by that one's own, and none comes twice.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::ErrorKind::InvalidConfig) if a model of the chain does not exist.
    pub fn chain(&self, name: &str) -> Result<Vec<&str>> {
        let mut chain = Vec::new();
        let mut seen = HashSet::new();
        let mut next = vec![name];
        while let Some(name) = next.pop() {
            let (name, model) = self.model(Some(name))?;
            if seen.insert(name) {
                chain.push(name);
                next.extend(model.fallback.iter().rev().map(String::as_str));
            }
        }
        Ok(chain)
    }
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
    match find_cycle(models) {
        None => Ok(()),
        Some(cycle) => Err(Error::invalid_config(format!(
            "models.{}.fallback: leads back to the model itself: {}",
            cycle[0],
            cycle.join(" -> ")
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
    fn a_long_chain_is_no_deep_recursion() {
        let names: Vec<String> = (0..5000).map(|i| format!("m{i}")).collect();
        let mut text = String::new();
        for (i, name) in names.iter().enumerate() {
            let next = names.get(i + 1).map_or(String::new(), |n| format!("\"{n}\""));
            text += &format!("[models.{name}]\nfallback = [{next}]\n");
        }
        let config = Config::from_str(&text, Format::Toml).unwrap();
        assert_eq!(config.chain("m0").unwrap().len(), 5000);
    }
}
