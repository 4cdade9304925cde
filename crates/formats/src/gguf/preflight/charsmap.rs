//! The normalisation of a Unigram tokenizer, `tokenizer.ggml.precompiled_charsmap`: a trie of what is replaced, and the replacements.
//!
//! Layout: the bytes of the trie as u32; the trie, a double array of u32; replacements, each of which ends with NUL. llama.cpp
//! checks an index when a text leads to it, and ends the process then, so everything that a text can lead to is looked at here.

/// What is wrong with a map: where, what was found, what was expected. `Ok` if no text can lead out of it.
pub(super) fn check(map: &[u8]) -> Result<(), String> {
    let (size, rest) = map
        .split_first_chunk::<4>()
        .ok_or_else(|| format!("has {} bytes, expected at least 5", map.len()))?;
    let size = u32::from_le_bytes(*size) as usize;
    if size >= rest.len() {
        return Err(format!("says that its trie has {size} bytes, expected fewer than {}", rest.len()));
    }
    if !size.is_multiple_of(4) {
        return Err(format!("says that its trie has {size} bytes, expected a multiple of 4"));
    }
    let (trie, replacements) = rest.split_at(size);
    let nodes: Vec<u32> = trie.as_chunks().0.iter().map(|node| u32::from_le_bytes(*node)).collect();
    // A replacement is terminated if a NUL stands anywhere behind its start.
    let terminated = replacements.iter().rposition(|byte| *byte == 0).map_or(0, |last| last + 1);
    Walk { nodes: &nodes, terminated, states: vec![State::New; nodes.len()] }.all()
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    New,
    /// A text that leads here is being followed.
    Open,
    Done,
}

struct Walk<'a> {
    nodes: &'a [u32],
    /// Replacements that start before this end before the map does.
    terminated: usize,
    /// Of each place from which a byte leads on.
    states: Vec<State>,
}

impl Walk<'_> {
    fn node(&self, index: usize) -> Result<u32, String> {
        let nodes = self.nodes.len();
        let node = self.nodes.get(index).copied();
        node.ok_or_else(|| format!("leads to entry {index} of its trie, which has {nodes}"))
    }

    /// What an index is combined with to find what follows.
    fn base(node: u32) -> usize {
        ((node >> 10) << ((node & (1 << 9)) >> 6)) as usize
    }

    fn all(mut self) -> Result<(), String> {
        let Some(&root) = self.nodes.first() else { return Ok(()) };
        let root = Self::base(root);
        self.node(root)?;
        self.states[root] = State::Open;
        // Places with the byte that is tried next.
        let mut path = vec![(root, 1usize)];
        while let Some((place, byte)) = path.last_mut() {
            if *byte > 255 {
                self.states[*place] = State::Done;
                path.pop();
                continue;
            }
            let (child, wanted) = (*place ^ *byte, *byte as u32);
            *byte += 1;
            let node = self.node(child)?;
            if node & ((1 << 31) | 0xff) != wanted {
                continue;
            }
            let next = child ^ Self::base(node);
            if node & (1 << 8) != 0 {
                let offset = (self.node(next)? & !(1 << 31)) as usize;
                if offset >= self.terminated {
                    return Err(format!(
                        "has a replacement at byte {offset} which no NUL ends, expected one of the first {}",
                        self.terminated
                    ));
                }
            }
            // Any byte may follow, and is looked for from here.
            self.node(next)?;
            match self.states[next] {
                State::Done => {}
                State::Open => return Err(format!("has a loop in its trie at entry {next}")),
                State::New => {
                    self.states[next] = State::Open;
                    path.push((next, 1));
                }
            }
        }
        Ok(())
    }
}
