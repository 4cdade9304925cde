//! How the prompts that are computed at the same time share the tokens of a step.

use std::time::Instant;

/// One part in so many of each step goes to the prompt that came first.
const OLDEST: usize = 4;

/// A prompt that can go on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiting {
    /// Its place among the active jobs.
    pub(crate) index: usize,
    /// Tokens that are not computed yet.
    pub(crate) remaining: usize,
    /// When its request came.
    pub(crate) accepted: Instant,
}

/// Divides `budget` tokens among `prompts`; returns index and tokens of those that get any. `step` counts the steps.
///
/// The shortest remaining prompt comes first, so that a short request waits for other short ones and not for the whole of
/// a long prompt. A quarter of each step goes to the oldest prompt, so that a long one comes to its end however many short
/// ones there are. One prompt alone gets the whole budget.
pub(crate) fn divide(mut prompts: Vec<Waiting>, budget: usize, step: usize) -> Vec<(usize, usize)> {
    let Some(oldest) = prompts.iter().min_by_key(|p| (p.accepted, p.index)).map(|p| p.index) else {
        return Vec::new();
    };
    // Of fewer tokens than parts, the oldest prompt gets one in some of the steps.
    let reserved = if budget < OLDEST { usize::from(step.is_multiple_of(OLDEST)) } else { budget / OLDEST };
    prompts.sort_by_key(|p| (p.remaining, p.accepted, p.index));
    let mut shares: Vec<(usize, usize)> = prompts.iter().map(|p| (p.index, 0)).collect();
    let mut left = budget;
    for pass in [Some(oldest), None] {
        for (share, prompt) in shares.iter_mut().zip(&prompts) {
            let most = match pass {
                Some(only) if only != prompt.index => 0,
                Some(_) => reserved,
                None => left,
            };
            let more = (prompt.remaining - share.1).min(most).min(left);
            share.1 += more;
            left -= more;
        }
    }
    shares.retain(|share| share.1 > 0);
    shares
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Prompts of these lengths, the first the oldest.
    fn prompts(remaining: &[usize]) -> Vec<Waiting> {
        let now = Instant::now();
        let prompts = remaining.iter().enumerate();
        prompts
            .map(|(index, &remaining)| Waiting {
                index,
                remaining,
                accepted: now + Duration::from_millis(index as u64),
            })
            .collect()
    }

    #[test]
    fn one_prompt_gets_all() {
        assert_eq!(divide(prompts(&[1000]), 128, 0), [(0, 128)]);
        assert_eq!(divide(prompts(&[10]), 128, 0), [(0, 10)]);
        assert_eq!(divide(Vec::new(), 128, 0), []);
    }

    #[test]
    fn the_shortest_comes_first_and_the_oldest_has_a_quarter() {
        assert_eq!(divide(prompts(&[1000, 20]), 128, 0), [(1, 20), (0, 108)]);
        assert_eq!(divide(prompts(&[1000, 300]), 128, 0), [(1, 96), (0, 32)]);
        assert_eq!(divide(prompts(&[1000, 300, 50]), 128, 0), [(2, 50), (1, 46), (0, 32)]);
        assert_eq!(divide(prompts(&[20, 1000]), 128, 0), [(0, 20), (1, 108)]);
    }

    #[test]
    fn equals_keep_their_order() {
        assert_eq!(divide(prompts(&[100, 100, 100]), 128, 0), [(0, 100), (1, 28)]);
    }

    #[test]
    fn a_small_budget_is_divided_over_steps() {
        let steps: Vec<_> = (0..8).map(|step| divide(prompts(&[1000, 20]), 1, step)).collect();
        assert_eq!(steps.iter().filter(|shares| **shares == [(0, 1)]).count(), 2);
        assert_eq!(steps.iter().filter(|shares| **shares == [(1, 1)]).count(), 6);
    }

    /// However many short prompts come, the long one ends after four times the work that it takes alone.
    #[test]
    fn nothing_starves() {
        let (mut long, mut steps) = (5000, 0);
        while long > 0 {
            let shares = divide(prompts(&[long, 90, 120, 200]), 128, steps);
            assert_eq!(shares.iter().map(|share| share.1).sum::<usize>(), 128);
            long -= shares.iter().find(|share| share.0 == 0).map_or(0, |share| share.1);
            steps += 1;
        }
        assert!(steps <= 4 * 5000_usize.div_ceil(128) + 1, "{steps}");
    }
}
