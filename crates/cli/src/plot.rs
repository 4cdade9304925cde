//! Plots as SVG: points or lines over a linear axis, values on a linear or a logarithmic one.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (860, 320);
const COLOURS: [RGBColor; 5] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 102, 20),
    RGBColor(44, 140, 60),
    RGBColor(148, 80, 170),
    RGBColor(120, 120, 120),
];

/// What is drawn.
#[derive(Debug, Default)]
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    /// Values on a logarithmic axis. What is 0 is drawn at its lower end.
    pub(crate) log: bool,
    pub(crate) series: Vec<Series>,
    /// Horizontal lines, such as what is allowed.
    pub(crate) limits: Vec<(String, f64)>,
}

/// One row of values.
#[derive(Debug, Default)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
    /// Connect them.
    pub(crate) line: bool,
    /// Where a value scatters: its place, and from where to where.
    pub(crate) spreads: Vec<(f64, f64, f64)>,
    /// What its values cannot exceed: a dashed line in its colour.
    pub(crate) limit: Vec<(f64, f64)>,
}

/// Plots below each other as one SVG document; `None` if there is nothing to draw in any of them.
pub(crate) fn stacked(plots: &[Plot]) -> Option<String> {
    let drawn: Vec<(&Plot, Ranges)> = plots.iter().filter_map(|plot| Some((plot, plot.ranges()?))).collect();
    if drawn.is_empty() {
        return None;
    }
    let mut svg = String::new();
    {
        let size = (SIZE.0, SIZE.1 * drawn.len() as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).ok()?;
        // The text backend has no fonts to fail with; what remains are impossible ranges, which `ranges` excludes.
        for (area, (plot, ranges)) in area.split_evenly((drawn.len(), 1)).iter().zip(&drawn) {
            plot.draw(area, *ranges).ok()?;
        }
        area.present().ok()?;
    }
    Some(svg)
}

/// The ends of the axes: left and right, low and high.
type Ranges = ((f64, f64), (f64, f64));

impl Plot {
    /// The plot as an SVG document; `None` if there is nothing to draw.
    pub(crate) fn svg(&self) -> Option<String> {
        stacked(std::slice::from_ref(self))
    }

    fn ranges(&self) -> Option<Ranges> {
        let points = || self.series.iter().flat_map(|s| &s.points);
        let finite = |values: &mut dyn Iterator<Item = f64>| {
            values.filter(|v| v.is_finite()).fold(None, |range: Option<(f64, f64)>, v| {
                Some(range.map_or((v, v), |(low, high)| (low.min(v), high.max(v))))
            })
        };
        let (left, right) = finite(&mut points().map(|p| p.0))?;
        let positive = |v: f64| !self.log || v > 0.0;
        let spreads = self.series.iter().flat_map(|s| &s.spreads).flat_map(|&(_, low, high)| [low, high]);
        let limits = self.limits.iter().map(|l| l.1);
        let limits = limits.chain(self.series.iter().flat_map(|s| &s.limit).map(|p| p.1));
        let values = points().map(|p| p.1).chain(spreads).chain(limits).filter(|&v| positive(v));
        let (low, high) = match finite(&mut values.map(|v| self.scaled(v))) {
            Some((low, high)) if self.log => (low.floor(), high.ceil().max(low.floor() + 1.0)),
            // The legend has its place above lines that may be anywhere.
            Some((_, high)) if self.has_limits() && high > 0.0 => {
                (0.0, high * (1.1 + 0.1 * self.series.len() as f64))
            }
            Some((_, high)) => (0.0, if high > 0.0 { high * 1.08 } else { 1.0 }),
            // All are 0.
            None => (-9.0, 0.0),
        };
        // Counts are drawn from 0, so that twice as many are twice as far.
        let (left, right) = if self.has_limits() { (left.min(0.0), right * 1.04) } else { (left, right) };
        Some(((left, right.max(left + 1.0)), (low, high)))
    }

    fn has_limits(&self) -> bool {
        self.series.iter().any(|series| !series.limit.is_empty())
    }

    fn scaled(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }

    fn draw(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        ((left, right), (low, high)): Ranges,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 16))
            .margin(10)
            .margin_right(24)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(left..right, low..high)?;
        let log = self.log;
        let digits = if high > 6.0 { 0 } else { 2 };
        let label = move |value: &f64| {
            if log { format!("1e{value:.0}") } else { format!("{value:.digits$}") }
        };
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .y_labels(if log { (high - low) as usize + 1 } else { 6 })
            .y_label_formatter(&label)
            .x_labels(if right - left < 10.0 { (right - left) as usize + 1 } else { 10 })
            .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x:.0}") } else { String::new() })
            .bold_line_style(RGBColor(225, 225, 225))
            .light_line_style(WHITE)
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let place = |&(x, y): &(f64, f64)| (x, self.scaled(y).clamp(low, high));
            let points = series.points.iter().filter(|(_, y)| !y.is_nan()).map(place);
            let spreads = series.spreads.iter().map(|&(x, from, to)| {
                PathElement::new(vec![place(&(x, from)), place(&(x, to))], colour.stroke_width(2))
            });
            chart.draw_series(spreads)?;
            let dashes = DashedLineSeries::new(series.limit.iter().map(place), 6, 4, colour.stroke_width(1));
            chart.draw_series(dashes)?;
            let drawn = if series.line {
                chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
                chart.draw_series(points.map(|p| Circle::new(p, 3, colour.filled())))?
            } else {
                chart.draw_series(points.map(|p| Circle::new(p, 2, colour.filled())))?
            };
            let colour = *colour;
            drawn
                .label(&series.name)
                .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 10, y + 4)], colour.filled()));
        }
        for (name, value) in self.limits.iter().filter(|(_, value)| !log || *value > 0.0) {
            let y = self.scaled(*value);
            chart.draw_series(std::iter::once(PathElement::new(
                vec![(left, y), (right, y)],
                BLACK.stroke_width(1),
            )))?;
            let style = ("sans-serif", 12).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Bottom));
            chart.draw_series(std::iter::once(Text::new(format!(" {name}"), (left, y), style)))?;
        }
        if self.series.len() > 1 || self.has_limits() {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .draw()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>, log: bool) -> Option<String> {
        let series = vec![Series { name: "a <b>".to_owned(), points, line: true, ..Series::default() }];
        Plot {
            title: "t & u".to_owned(),
            log,
            series,
            limits: vec![("allowed".into(), 0.5)],
            ..Plot::default()
        }
        .svg()
    }

    #[test]
    fn any_values_make_a_picture_and_none_make_nothing() {
        for log in [false, true] {
            let points = vec![(0.0, 0.0), (1.0, 1e-7), (2.0, f64::NAN), (3.0, f64::INFINITY), (3.0, 40.0)];
            let svg = plot(points, log).unwrap();
            assert!(svg.starts_with("<svg") && svg.contains("t &amp; u") && svg.contains("allowed"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(plot(vec![(5.0, 0.0)], log).is_some());
            assert!(plot(Vec::new(), log).is_none());
        }
    }
}
