//! Plots as SVG, made by hand.

use std::fmt::Write;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 520.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 880.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 380.0;
/// Colours that are told from each other by most eyes.
const COLOURS: [&str; 6] = ["#4477aa", "#ee6677", "#ccbb44", "#66ccee", "#228833", "#aa3377"];

/// A drawing of fixed size.
#[derive(Debug)]
struct Drawing {
    body: String,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

impl Drawing {
    fn new(title: &str) -> Self {
        let mut drawing = Self { body: String::new() };
        let _ = writeln!(
            drawing.body,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"
        );
        drawing.text(LEFT, 28.0, "start", 16, title);
        drawing
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, size: u32, text: &str) {
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{}</text>",
            escape(text)
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str) {
        let _ = writeln!(
            self.body,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {stroke}/>",
            from.0, from.1, to.0, to.1
        );
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             fill=\"{fill}\"/>"
        );
    }

    fn legend(&mut self, names: &[String]) {
        for (position, name) in names.iter().enumerate() {
            let x = LEFT + 165.0 * position as f64;
            self.rect(x, TOP - 20.0, 12.0, 12.0, COLOURS[position % COLOURS.len()]);
            self.text(x + 17.0, TOP - 10.0, "start", 12, name);
        }
    }

    fn finish(mut self, notes: &[String]) -> String {
        for (position, note) in notes.iter().enumerate() {
            self.text(LEFT, BOTTOM + 50.0 + 16.0 * position as f64, "start", 11, note);
        }
        self.body.push_str("</svg>\n");
        self.body
    }
}

const AXIS: &str = "stroke=\"#333\"";
const GRID: &str = "stroke=\"#ddd\"";

/// A bar: its height in milliseconds, and the lowest and highest value behind it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bar {
    pub(super) value: f64,
    pub(super) lowest: f64,
    pub(super) highest: f64,
}

/// Bars in groups, on a logarithmic scale from 1 ms to 100 s. One row of bars for each group, in
/// the order of the names.
pub(super) fn bars(
    title: &str,
    names: &[String],
    groups: &[(String, Vec<Option<Bar>>)],
    notes: &[String],
) -> String {
    let mut drawing = Drawing::new(title);
    drawing.legend(names);
    let y = |ms: f64| BOTTOM - (BOTTOM - TOP) * (ms.clamp(1.0, 1e5).log10() / 5.0);
    for power in 0..=5 {
        let ms = 10f64.powi(power);
        drawing.line((LEFT, y(ms)), (RIGHT, y(ms)), GRID);
        drawing.text(LEFT - 6.0, y(ms) + 4.0, "end", 11, &format!("{ms} ms"));
    }
    let group_width = (RIGHT - LEFT) / groups.len().max(1) as f64;
    let bar_width = group_width * 0.8 / names.len().max(1) as f64;
    for (number, (label, bars)) in groups.iter().enumerate() {
        let left = LEFT + group_width * (number as f64 + 0.1);
        drawing.text(left + group_width * 0.4, BOTTOM + 20.0, "middle", 13, label);
        for (position, bar) in bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let x = left + bar_width * position as f64;
            let colour = COLOURS[position % COLOURS.len()];
            let top = y(bar.value);
            drawing.rect(x, top, bar_width * 0.85, BOTTOM - top, colour);
            let middle = x + bar_width * 0.425;
            drawing.line((middle, y(bar.lowest)), (middle, y(bar.highest)), AXIS);
            let label = format!("{:.0}", bar.value);
            drawing.text(middle, y(bar.highest) - 4.0, "middle", 10, &label);
        }
    }
    drawing.line((LEFT, BOTTOM), (RIGHT, BOTTOM), AXIS);
    drawing.finish(notes)
}

/// Curves of values from 0 to 1 over seconds; the first value of each is at `from`.
pub(super) fn curves(
    title: &str,
    from: f64,
    step: f64,
    named: &[(String, Vec<Option<f64>>)],
    notes: &[String],
) -> String {
    let mut drawing = Drawing::new(title);
    let names: Vec<String> = named.iter().map(|(name, _)| name.clone()).collect();
    drawing.legend(&names);
    let count = named.iter().map(|(_, values)| values.len()).max().unwrap_or(1).max(1);
    let x = |bin: f64| LEFT + (RIGHT - LEFT) * bin / count as f64;
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * value.clamp(0.0, 1.1) / 1.1;
    for tenth in [0.0, 0.25, 0.5, 0.75, 1.0] {
        drawing.line((LEFT, y(tenth)), (RIGHT, y(tenth)), GRID);
        drawing.text(LEFT - 6.0, y(tenth) + 4.0, "end", 11, &format!("{tenth}"));
    }
    let end = from + count as f64 * step;
    let mut second = from.ceil();
    while second <= end {
        let at = x((second - from) / step);
        drawing.line((at, BOTTOM), (at, if second == 0.0 { TOP } else { BOTTOM + 4.0 }), AXIS);
        drawing.text(at, BOTTOM + 18.0, "middle", 11, &format!("{second} s"));
        second += 1.0;
    }
    for (position, (_, values)) in named.iter().enumerate() {
        // Known values in a row are one line; where none is known, the line is interrupted.
        let mut points = String::new();
        let mut lines = Vec::new();
        for (bin, value) in values.iter().enumerate() {
            match value {
                Some(value) => {
                    let _ = write!(points, "{:.1},{:.1} ", x(bin as f64 + 0.5), y(*value));
                }
                None => lines.push(std::mem::take(&mut points)),
            }
        }
        lines.push(points);
        let colour = COLOURS[position % COLOURS.len()];
        for points in lines.iter().filter(|points| !points.is_empty()) {
            let _ = writeln!(
                drawing.body,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                points.trim_end()
            );
        }
    }
    drawing.line((LEFT, BOTTOM), (RIGHT, BOTTOM), AXIS);
    drawing.finish(notes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_whole() {
        let bar = Bar { value: 30.0, lowest: 20.0, highest: 45.0 };
        let names = ["a".to_owned(), "b<c".to_owned()];
        let groups = [("10M".to_owned(), vec![Some(bar), None])];
        let plot = bars("gap", &names, &groups, &["a note".to_owned()]);
        assert!(plot.starts_with("<svg ") && plot.ends_with("</svg>\n"));
        assert!(plot.contains("b&lt;c") && plot.contains("a note"));
        let values = vec![Some(1.0), None, Some(0.5), Some(0.2)];
        let plot = curves("curve", -1.0, 0.1, &[("a".to_owned(), values)], &[]);
        assert_eq!(plot.matches("<polyline").count(), 2);
        assert_eq!(plot.matches('<').count(), plot.matches('>').count());
    }
}
