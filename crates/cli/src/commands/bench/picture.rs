//! Speed of decoding by depth, by threads and by sequences, each with the limit that the memory's bandwidth sets.

use super::result::{Point, Results};
use crate::plot::{Plot, Series, stacked};

/// What a plot goes along; the other two name its series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Depth,
    Threads,
    Sequences,
}

impl Axis {
    const ALL: [Self; 3] = [Self::Depth, Self::Threads, Self::Sequences];

    fn of(self, point: &Point) -> usize {
        match self {
            Self::Depth => point.prompt_tokens,
            Self::Threads => point.threads,
            Self::Sequences => point.batch,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Depth => "by depth",
            Self::Threads => "by threads",
            Self::Sequences => "by sequences at the same time",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Depth => "tokens of context",
            Self::Threads => "threads",
            Self::Sequences => "sequences",
        }
    }

    fn name(self, value: usize) -> String {
        match (self, value) {
            (Self::Threads, 1) => "1 thread".to_owned(),
            (Self::Sequences, 1) => "1 sequence".to_owned(),
            _ => format!("{value} {}", self.unit()),
        }
    }
}

/// One plot for each axis along which something changes, or a point where nothing does; `None` without any speed.
pub(super) fn svg(results: &Results) -> Option<String> {
    let plots: Vec<Plot> = Axis::ALL.iter().filter_map(|axis| plot(results, *axis, 2)).collect();
    if plots.is_empty() { plot(results, Axis::Depth, 1)?.svg() } else { stacked(&plots) }
}

/// The points along an axis, in series of at least `least` points.
fn plot(results: &Results, axis: Axis, least: usize) -> Option<Plot> {
    let others: Vec<Axis> = Axis::ALL.into_iter().filter(|other| *other != axis).collect();
    let key = |point: &Point| -> Vec<usize> { others.iter().map(|other| other.of(point)).collect() };
    let measured: Vec<&Point> =
        results.points.iter().filter(|point| point.decode_tokens_per_second.is_some()).collect();
    let mut keys: Vec<Vec<usize>> = measured.iter().map(|point| key(point)).collect();
    keys.sort_unstable();
    keys =
        keys.chunk_by(|a, b| a == b).filter(|same| same.len() >= least).map(|same| same[0].clone()).collect();
    // What is the same everywhere need not be in each name.
    let differs = |i: usize| keys.iter().any(|key| key[i] != keys[0][i]);
    let named: Vec<usize> = (0..others.len()).filter(|i| differs(*i)).collect();
    let named = if named.is_empty() { (0..others.len()).collect() } else { named };
    let mut series = Vec::new();
    for wanted in &keys {
        let mut points: Vec<&Point> =
            measured.iter().copied().filter(|point| key(point) == *wanted).collect();
        points.sort_by_key(|point| axis.of(point));
        let x = |point: &Point| axis.of(point) as f64;
        let decode = |point: &&Point| point.decode_tokens_per_second.map(|speed| (x(point), speed));
        let speeds: Vec<_> = points.iter().filter_map(decode).collect();
        let names: Vec<String> = named.iter().map(|i| others[*i].name(wanted[*i])).collect();
        series.push(Series {
            name: names.join(", "),
            points: speeds.iter().map(|(x, speed)| (*x, speed.median)).collect(),
            line: true,
            spreads: speeds.iter().map(|(x, speed)| (*x, speed.min, speed.max)).collect(),
            limit: points.iter().filter_map(|p| Some((x(p), p.decode_limit_tokens_per_second?))).collect(),
        });
    }
    let limited = series.iter().any(|series| !series.limit.is_empty());
    let note = if limited { " (dashed: all that memory bandwidth allows)" } else { "" };
    (!series.is_empty()).then(|| Plot {
        title: format!("{}: decoding {}{note}", results.model.name, axis.title()),
        x: axis.unit(),
        y: "tokens/s",
        series,
        ..Plot::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::reads::Reads;
    use super::super::result::tests::results;
    use super::*;

    #[test]
    fn an_axis_is_drawn_where_something_changes_along_it() {
        let points: &[(usize, usize, usize, &[f64])] =
            &[(1, 1, 512, &[10.0]), (2, 1, 512, &[19.0, 21.0]), (2, 1, 128, &[22.0]), (2, 1, 2048, &[])];
        let mut results = results(points);
        results.relate_to_limits(Some(Reads { linears: 30_000, head: 10_000, kv_position: Some(20) }));
        let depth = plot(&results, Axis::Depth, 2).unwrap();
        assert_eq!((depth.series.len(), depth.series[0].name.as_str()), (1, "2 threads, 1 sequence"));
        assert_eq!(depth.series[0].points, [(128.0, 22.0), (512.0, 20.0)]);
        assert_eq!(depth.series[0].spreads[1], (512.0, 19.0, 21.0));
        let limits: Vec<f64> = depth.series[0].limit.iter().map(|point| point.1).collect();
        assert_eq!(limits.len(), 2);
        assert!(limits[0] > limits[1], "deeper is slower: {limits:?}");
        let threads = plot(&results, Axis::Threads, 2).unwrap();
        assert_eq!(threads.series[0].points, [(1.0, 10.0), (2.0, 20.0)]);
        assert_eq!(threads.series[0].limit[1].1, 2.0 * threads.series[0].limit[0].1);
        assert!(plot(&results, Axis::Sequences, 2).is_none());
        let one = plot(&results, Axis::Sequences, 1).unwrap();
        let names: Vec<&str> = one.series.iter().map(|series| series.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "128 tokens of context, 2 threads",
                "512 tokens of context, 1 thread",
                "512 tokens of context, 2 threads"
            ]
        );
        let svg = svg(&results).unwrap();
        assert!(svg.contains("by depth") && svg.contains("by threads") && svg.contains("dashed"), "{svg}");
    }

    #[test]
    fn one_point_is_drawn_and_none_is_nothing() {
        assert!(svg(&results(&[(1, 1, 8, &[10.0])])).unwrap().contains("by depth"));
        assert!(svg(&results(&[(1, 1, 8, &[])])).is_none());
    }
}
