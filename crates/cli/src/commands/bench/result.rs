//! What a measurement gives, as it is printed, drawn, written to a file and read again to be compared.

use serde::{Deserialize, Serialize};
use ternion::MemoryPlan;

use super::machine::Machine;
use super::reads::Reads;
use crate::rss::Memory;

/// Tells the file from any other JSON.
pub(super) const FORMAT: &str = "ternion-bench";
/// Counted up when a reader of the old form would misread the new one.
pub(super) const VERSION: u32 = 1;

/// Minimum, median and maximum over the runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { min, median, max })
    }

    /// Whether some value lies in both.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }
}

/// All that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Results {
    /// [`FORMAT`].
    pub(super) format: String,
    /// [`VERSION`].
    pub(super) version: u32,
    /// Ctrl-C ended it before all was measured.
    pub(super) interrupted: bool,
    pub(super) machine: Machine,
    pub(super) model: Model,
    /// Runs that were asked for at each point, and those before them that are not counted.
    pub(super) repeat: u32,
    pub(super) warm_up: u32,
    /// One for each number of threads.
    pub(super) loads: Vec<Load>,
    /// `None` where the checkpoint cannot be read on this side.
    pub(super) reads: Option<Reads>,
    pub(super) points: Vec<Point>,
    pub(super) memory: Option<Memory>,
    /// What was planned before the model was loaded; the peak is below its sum.
    pub(super) memory_plan: Option<MemoryPlan>,
    /// That sum.
    pub(super) planned_bytes: Option<u64>,
    /// Weights that are read from the disk in a second of decoding (median of the first point), where not all are kept in memory.
    pub(super) streamed_bytes_per_second: Option<f64>,
}

/// Which model on which engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Model {
    pub(super) name: String,
    pub(super) backend: String,
    pub(super) format: String,
    pub(super) parameters: u64,
}

/// What belongs to a number of threads.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Load {
    pub(super) threads: usize,
    /// From the call to the model that can answer.
    pub(super) seconds: f64,
    /// Memory that so many threads read in a second: the most that a bare loop or decoding itself has reached. `None` where it
    /// was not measured.
    pub(super) bandwidth_bytes_per_second: Option<f64>,
}

/// One combination of threads, sequences and tokens. All speeds are in tokens per second of all sequences together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Point {
    pub(super) threads: usize,
    /// Sequences at the same time.
    pub(super) batch: usize,
    /// Tokens of context before the first that is generated, of each sequence.
    pub(super) prompt_tokens: usize,
    /// Tokens that each sequence generates.
    pub(super) decode_tokens: usize,
    /// Runs that count.
    pub(super) runs: u32,
    /// `None` where the prompt was computed only once.
    pub(super) prefill_tokens_per_second: Option<Spread>,
    pub(super) decode_tokens_per_second: Option<Spread>,
    /// From the request to the first token of the last sequence that gets one.
    pub(super) first_token_seconds: Option<Spread>,
    /// Joules of the processor for each token of prompt.
    pub(super) prefill_joules_per_token: Option<Spread>,
    /// Joules of the processor for each token that is generated.
    pub(super) decode_joules_per_token: Option<Spread>,
    /// Weights, keys and values that have to be read for each token.
    pub(super) decode_bytes_per_token: Option<f64>,
    /// How fast decoding would be if it did nothing but read those.
    pub(super) decode_limit_tokens_per_second: Option<f64>,
    /// The median as a part of that.
    pub(super) decode_share_of_limit: Option<f64>,
}

impl Results {
    /// Nothing measured yet.
    pub(super) fn new(machine: Machine, repeat: u32, warm_up: u32) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            interrupted: false,
            machine,
            model: Model::default(),
            repeat,
            warm_up,
            loads: Vec::new(),
            reads: None,
            points: Vec::new(),
            memory: None,
            memory_plan: None,
            planned_bytes: None,
            streamed_bytes_per_second: None,
        }
    }

    /// Memory that `threads` threads read in a second.
    pub(super) fn bandwidth(&self, threads: usize) -> Option<f64> {
        self.loads.iter().find(|load| load.threads == threads)?.bandwidth_bytes_per_second
    }

    /// Fills in what follows from the bytes that are read and the machine's bandwidth.
    pub(super) fn relate_to_limits(&mut self, reads: Option<Reads>) {
        let mut points = std::mem::take(&mut self.points);
        for point in &mut points {
            let bytes = reads.as_ref().and_then(|reads| {
                reads.per_token(point.batch, point.prompt_tokens as f64 + point.decode_tokens as f64 / 2.0)
            });
            // What decoding has read in a second, the memory can give: a loop that was slower met a busy machine.
            let reached =
                point.decode_tokens_per_second.zip(bytes).map(|(decode, bytes)| decode.median * bytes);
            let load = self.loads.iter_mut().find(|load| load.threads == point.threads);
            if let Some(Load { bandwidth_bytes_per_second: Some(bandwidth), .. }) = load {
                *bandwidth = bandwidth.max(reached.unwrap_or_default());
            }
            point.decode_bytes_per_token = bytes;
        }
        for point in &mut points {
            let bytes = point.decode_bytes_per_token;
            let limit = self.bandwidth(point.threads).zip(bytes).map(|(bandwidth, bytes)| bandwidth / bytes);
            point.decode_limit_tokens_per_second = limit;
            point.decode_share_of_limit =
                point.decode_tokens_per_second.zip(limit).map(|(decode, limit)| decode.median / limit);
        }
        let decode = points.first().and_then(|point| point.decode_tokens_per_second);
        let streamed = self.memory_plan.as_ref().map(|plan| plan.streamed_bytes).filter(|bytes| *bytes > 0);
        self.streamed_bytes_per_second =
            decode.zip(streamed).map(|(decode, bytes)| decode.median * bytes as f64);
        self.points = points;
        self.reads = reads;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A result with these points: threads, sequences, tokens of context, and speeds of decoding.
    pub(crate) fn results(points: &[(usize, usize, usize, &[f64])]) -> Results {
        let machine = Machine {
            cpu: "Some CPU".into(),
            cores: 4,
            cores_available: 2,
            instructions: "scalar".into(),
            os: "Some OS".into(),
            memory_bytes: None,
            load_average: Some(0.0),
            ternion: "0.0.0".into(),
        };
        let mut results = Results::new(machine, 3, 1);
        results.model = Model { name: "m".into(), backend: "b".into(), format: "f".into(), parameters: 1000 };
        for &(threads, batch, prompt_tokens, decode) in points {
            if results.bandwidth(threads).is_none() {
                let bandwidth = Some(1e6 * threads as f64);
                results.loads.push(Load { threads, seconds: 0.5, bandwidth_bytes_per_second: bandwidth });
            }
            results.points.push(Point {
                threads,
                batch,
                prompt_tokens,
                decode_tokens: 20,
                runs: decode.len() as u32,
                decode_tokens_per_second: Spread::of(decode),
                ..Point::default()
            });
        }
        results
    }

    #[test]
    fn a_spread_is_ordered_and_its_median_is_in_the_middle() {
        let s = Spread::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((s.min, s.median, s.max), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of(&[4.0, 1.0]).unwrap().median, 2.5);
        assert!(Spread::of(&[]).is_none());
    }

    #[test]
    fn spreads_overlap_where_they_share_a_value() {
        let spread = |min, max| Spread { min, median: min, max };
        assert!(spread(1.0, 2.0).overlaps(&spread(2.0, 3.0)));
        assert!(spread(1.0, 5.0).overlaps(&spread(2.0, 3.0)) && spread(2.0, 3.0).overlaps(&spread(1.0, 5.0)));
        assert!(
            !spread(1.0, 2.0).overlaps(&spread(2.1, 3.0)) && !spread(2.1, 3.0).overlaps(&spread(1.0, 2.0))
        );
    }

    #[test]
    fn a_limit_counts_the_weights_once_for_all_sequences_and_keys_and_values_for_each() {
        let mut results = results(&[(1, 1, 90, &[50.0]), (2, 4, 90, &[100.0]), (3, 1, 90, &[])]);
        results.loads[2].bandwidth_bytes_per_second = None;
        results.relate_to_limits(Some(Reads { linears: 6000, head: 2000, kv_position: Some(20) }));
        // 8000 bytes of weights and, in the middle of the 20 tokens, 100 positions of 20 bytes.
        let found = |i: usize| {
            let point = &results.points[i];
            (point.decode_bytes_per_token, point.decode_limit_tokens_per_second, point.decode_share_of_limit)
        };
        assert_eq!(found(0), (Some(10_000.0), Some(100.0), Some(0.5)));
        assert_eq!(found(1), (Some(4_000.0), Some(500.0), Some(0.2)));
        assert_eq!(found(2), (Some(10_000.0), None, None));
        results.relate_to_limits(None);
        assert_eq!(results.points[0].decode_share_of_limit, None);
    }

    #[test]
    fn no_share_exceeds_all_of_the_bandwidth() {
        // A million bytes a second are measured, and decoding reads 1.6 million.
        let mut results = results(&[(1, 1, 10, &[80.0]), (1, 1, 30, &[160.0])]);
        results.relate_to_limits(Some(Reads { linears: 8000, head: 2000, kv_position: Some(0) }));
        assert_eq!(results.bandwidth(1), Some(1.6e6));
        let shares: Vec<_> = results.points.iter().map(|point| point.decode_share_of_limit).collect();
        assert_eq!(shares, [Some(0.5), Some(1.0)]);
    }
}
