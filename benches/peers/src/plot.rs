//! Pictures of lines, as SVG that reads on a bright and on a dark page.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 430.0;
/// Around the lines: left, top, right, bottom.
const MARGINS: (f64, f64, f64, f64) = (80.0, 70.0, 130.0, 52.0);

/// Of etcd, of Pontoon, and of whatever else there is.
const HUES: [&str; 4] = ["#c2571a", "#2070c0", "#2e8b57", "#8a4fbf"];
const GREY: &str = "#808080";

/// How an axis runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scale {
    /// From nothing, in equal steps
    Linear,
    /// In equal factors
    Logarithmic,
}

/// A line.
pub struct Line {
    /// Its name.
    pub name: String,
    /// Which colour, of a few.
    pub hue: usize,
    /// Whether it is told from another of its colour so.
    pub dashed: bool,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// A picture.
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Below the title, small, in two lines.
    pub about: [String; 2],
    /// Across: what, and how.
    pub x: (String, Scale),
    /// Upwards, likewise.
    pub y: (String, Scale),
    /// What is seen.
    pub lines: Vec<Line>,
}

/// An axis with its ends.
struct Axis {
    scale: Scale,
    least: f64,
    most: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// An axis of round numbers that holds all of `values`.
    fn new(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let values: Vec<f64> =
            values.filter(|v| v.is_finite() && (*v > 0.0 || scale == Scale::Linear)).collect();
        let most = values.iter().copied().fold(1.0, f64::max);
        let (least, most, ticks) = match scale {
            Scale::Linear => {
                let step = round_step(most);
                let steps = (most / step).ceil() as u32;
                (0.0, f64::from(steps) * step, (0..=steps).map(|n| f64::from(n) * step).collect())
            }
            Scale::Logarithmic => {
                let least = values.iter().copied().fold(most, f64::min);
                let low = least.log10().floor() as i32;
                let high = (most.log10().ceil() as i32).max(low + 1);
                let ticks: Vec<f64> = (low..=high).map(|power| 10f64.powi(power)).collect();
                (10f64.powi(low), 10f64.powi(high), ticks)
            }
        };
        Axis { scale, least, most, ticks }
    }

    /// The same, but of equal factors it has the values themselves, which are few there.
    fn across(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        if scale == Scale::Linear {
            return Axis::new(scale, values);
        }
        let mut ticks: Vec<f64> = values.filter(|value| *value > 0.0).collect();
        ticks.sort_unstable_by(f64::total_cmp);
        ticks.dedup();
        let least = ticks.first().copied().unwrap_or(1.0);
        let most = ticks.last().copied().unwrap_or(1.0).max(2.0 * least);
        Axis { scale, least, most, ticks }
    }

    /// From 0 at the least to 1 at the most.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.least) / (self.most - self.least),
            Scale::Logarithmic => (value / self.least).ln() / (self.most / self.least).ln(),
        }
    }
}

/// A step of 1, 2 or 5 times a power of ten, of which about six make `most`.
fn round_step(most: f64) -> f64 {
    let raw = most / 6.0;
    let power = 10f64.powf(raw.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= raw).unwrap_or(raw)
}

impl Plot {
    /// The picture as text.
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let x = Axis::across(self.x.1, points().map(|point| point.0));
        let y = Axis::new(self.y.1, points().map(|point| point.1));
        let (left, top, right, bottom) = MARGINS;
        let across = |value: f64| left + x.place(value) * (WIDTH - left - right);
        let up = |value: f64| HEIGHT - bottom - y.place(value) * (HEIGHT - top - bottom);

        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\" fill=\"{GREY}\">\n"
        );
        let mut text = |x: f64, y: f64, anchor: &str, more: &str, text: &str| {
            writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{}</text>",
                escaped(text)
            )
            .expect("writing to a string");
        };
        text(left, 22.0, "start", "font-size=\"15\"", &self.title);
        for (line, about) in (0..).map(f64::from).zip(&self.about) {
            text(left, 40.0 + 13.0 * line, "start", "font-size=\"10\"", about);
        }
        text((left + WIDTH - right) / 2.0, HEIGHT - 12.0, "middle", "", &self.x.0);
        let middle = (top + HEIGHT - bottom) / 2.0;
        text(18.0, middle, "middle", &format!("transform=\"rotate(-90 18 {middle})\""), &self.y.0);
        for tick in &x.ticks {
            text(across(*tick), HEIGHT - bottom + 18.0, "middle", "", &shown(*tick));
        }
        for tick in &y.ticks {
            text(left - 8.0, up(*tick) + 4.0, "end", "", &shown(*tick));
        }
        for (line, place) in self.lines.iter().zip(self.name_places(&up)) {
            let colour = format!("fill=\"{}\"", HUES[line.hue % HUES.len()]);
            text(WIDTH - right + 10.0, place + 4.0, "start", &colour, &line.name);
        }
        let mut stroke = |points: &str, more: &str| {
            writeln!(svg, "<polyline points=\"{points}\" fill=\"none\" {more}/>")
                .expect("writing to a string");
        };
        for tick in &y.ticks {
            let (height, end) = (up(*tick), WIDTH - right);
            let more = format!("stroke=\"{GREY}\" stroke-opacity=\"0.3\"");
            stroke(&format!("{left:.1},{height:.1} {end:.1},{height:.1}"), &more);
        }
        for line in &self.lines {
            let points: Vec<String> =
                line.points.iter().map(|(a, b)| format!("{:.1},{:.1}", across(*a), up(*b))).collect();
            let dashes = if line.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
            let more = format!("stroke=\"{}\" stroke-width=\"2\"{dashes}", HUES[line.hue % HUES.len()]);
            stroke(&points.join(" "), &more);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Where the names stand: at their lines' ends, moved apart where those are close.
    fn name_places(&self, up: &impl Fn(f64) -> f64) -> Vec<f64> {
        const APART: f64 = 15.0;
        let ends = self.lines.iter().map(|line| line.points.last().map_or(MARGINS.1, |point| up(point.1)));
        let mut places: Vec<(usize, f64)> = ends.enumerate().collect();
        places.sort_by(|a, b| a.1.total_cmp(&b.1));
        for at in 1..places.len() {
            places[at].1 = places[at].1.max(places[at - 1].1 + APART);
        }
        places.sort_by_key(|(line, _)| *line);
        places.into_iter().map(|(_, place)| place).collect()
    }
}

/// A number with commas, or a small one as it is.
fn shown(number: f64) -> String {
    if number < 10.0 {
        return format!("{number}");
    }
    let digits = format!("{number:.0}");
    let mut shown = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
