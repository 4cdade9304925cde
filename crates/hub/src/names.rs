//! Short names of models that are known to run.
//!
//! A short name stands for a file set that Ternion has been tried with. Where hashes of its files are recorded, a download by the
//! short name must match them: that protects against a changed repository and against a mirror that serves something else. For the
//! other files, and for the models without recorded hashes, the hub's own hash is all there is.

use ternion_core::{Error, Result};

use crate::Address;

/// A model with a short name.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct KnownModel {
    /// The short name.
    pub name: &'static str,
    /// Its address on the hub.
    pub address: &'static str,
    /// What it is, in a few words.
    pub description: &'static str,
    /// Names of files and their recorded SHA-256, in hexadecimal.
    pub sha256: &'static [(&'static str, &'static str)],
}

impl KnownModel {
    /// All models with a short name.
    pub const ALL: &[Self] = &[
        Self {
            name: "bitnet-2b4t",
            address: "hf://microsoft/bitnet-b1.58-2B-4T",
            description: "BitNet b1.58 2B4T, packed safetensors",
            sha256: BITNET_2B4T,
        },
        known(
            "bitnet-2b4t-gguf",
            "hf://microsoft/bitnet-b1.58-2B-4T-gguf",
            "BitNet b1.58 2B4T, GGUF in I2_S",
        ),
        known("falcon-e-1b", "hf://tiiuae/Falcon-E-1B-Instruct", "Falcon-E 1B Instruct, packed safetensors"),
        known("falcon-e-3b", "hf://tiiuae/Falcon-E-3B-Instruct", "Falcon-E 3B Instruct, packed safetensors"),
        known(
            "bonsai-1.7b",
            "hf://prism-ml/Ternary-Bonsai-1.7B-gguf/Ternary-Bonsai-1.7B-Q2_0_g64.gguf",
            "Ternary Bonsai 1.7B, GGUF in Q2_0 with groups of 64",
        ),
        known(
            "bonsai-4b",
            "hf://prism-ml/Ternary-Bonsai-4B-gguf/Ternary-Bonsai-4B-Q2_0_g64.gguf",
            "Ternary Bonsai 4B, GGUF in Q2_0 with groups of 64",
        ),
        known(
            "bonsai-8b",
            "hf://prism-ml/Ternary-Bonsai-8B-gguf/Ternary-Bonsai-8B-Q2_0_g64.gguf",
            "Ternary Bonsai 8B, GGUF in Q2_0 with groups of 64",
        ),
    ];

    /// The model with this short name.
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().find(|model| model.name == name)
    }

    /// Its address.
    ///
    /// # Errors
    /// None for the models of [`ALL`](Self::ALL).
    pub fn address(&self) -> Result<Address> {
        self.address.parse()
    }

    /// Compares a file with the recorded hash, if there is one.
    pub(crate) fn check(&self, file: &str, found: &str) -> Result<()> {
        let Some((_, recorded)) = self.sha256.iter().find(|(name, _)| *name == file) else { return Ok(()) };
        if recorded.eq_ignore_ascii_case(found) {
            return Ok(());
        }
        Err(Error::invalid_model(format!(
            "the file is not the one that is recorded for `{}` (SHA-256 {found}, recorded {recorded}); name the model as {} to \
             use it nevertheless",
            self.name, self.address
        ))
        .with("file", file))
    }
}

const fn known(name: &'static str, address: &'static str, description: &'static str) -> KnownModel {
    KnownModel { name, address, description, sha256: &[] }
}

const BITNET_2B4T: &[(&str, &str)] = &[
    ("config.json", "2b43e80788972e6d53967b01ac3609d7df23cf0aabb0c866e51be694a59c1149"),
    ("generation_config.json", "af34a37cd006fd230106fcefc6bfdc1f775503aee05a80c174ccc5c6594f7054"),
    ("special_tokens_map.json", "462d91939dbc37178aa5a3eae7068d1990ccc92e09f288cc71f42cdf139d69cc"),
    ("tokenizer.json", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
    ("tokenizer_config.json", "d27b698683435b0b0dd544a591a30196b2b63f5fd4c8c64b9060a84dc185386f"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_short_name_has_an_address() {
        for model in KnownModel::ALL {
            model.address().unwrap();
            assert!(model.sha256.iter().all(|(_, hash)| hash.len() == 64));
            assert_eq!(KnownModel::named(model.name).unwrap().address, model.address);
        }
        let known = KnownModel::named("bitnet-2b4t").unwrap();
        assert!(known.check("README.md", "00").is_ok());
        assert!(known.check("config.json", "00").unwrap_err().to_string().contains("recorded"));
        assert!(known.check("config.json", &BITNET_2B4T[0].1.to_uppercase()).is_ok());
    }
}
