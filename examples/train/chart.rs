//! The loss curve as a picture.

use crate::{
    common::files::{partial_file, write_atomically},
    log::Row,
    pixel_font,
};
use anyhow::{Context, Result};
use plotters::{coord::Shift, prelude::*};
use std::{ops::Range, path::Path};

const SIZE: (u32, u32) = (1000, 720);
/// Room for the labels of the values.
const LEFT: i32 = 84;
const GRID: RGBColor = RGBColor(225, 225, 225);
const FAINT: RGBColor = RGBColor(200, 205, 215);
const BLUE: RGBColor = RGBColor(31, 87, 164);
const RED: RGBColor = RGBColor(190, 50, 40);

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Curve = Vec<(f64, f64)>;

/// Writes `loss.png`: training loss, raw and smoothed, above; validation, where there is any, below.
pub fn write(folder: &Path, rows: &[Row]) -> Result<()> {
    let raw: Curve = rows.iter().map(|row| (row.step as f64, f64::from(row.loss))).collect();
    let valid: Curve = rows.iter().filter_map(|row| Some((row.step as f64, row.valid_bpb?))).collect();
    if raw.is_empty() {
        return Ok(());
    }
    // A reader who has the picture open, and a kill, must never meet half of it.
    let file = partial_file(folder, ".png")?;
    draw(file.path(), &raw, &valid).context("cannot draw the loss curve")?;
    let contents = std::fs::read(file.path())?;
    write_atomically(&folder.join("loss.png"), &contents)
}

fn draw(path: &Path, raw: &Curve, valid: &Curve) -> Result<()> {
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let steps = 0.0..raw.last().map_or(1.0, |point| point.0).max(1.0);
    let smooth = smoothed(raw);
    let train = [(raw, FAINT), (&smooth, BLUE)];
    if valid.is_empty() {
        draw_panel(&root, "train loss, nats per token", &train, &steps)?;
    } else {
        let (upper, lower) = root.split_vertically(SIZE.1 as i32 / 2);
        draw_panel(&upper, "train loss, nats per token", &train, &steps)?;
        draw_panel(&lower, "validation, bits per byte", &[(valid, RED)], &steps)?;
    }
    root.present()?;
    Ok(())
}

/// Exponential mean over about a hundredth of the run, without the bias of its start.
fn smoothed(raw: &Curve) -> Curve {
    let keep = 1.0 - 1.0 / (raw.len() as f64 / 100.0).clamp(5.0, 200.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    raw.iter()
        .map(|&(step, loss)| {
            sum = keep * sum + loss;
            weight = keep * weight + 1.0;
            (step, sum / weight)
        })
        .collect()
}

fn draw_panel(area: &Area, title: &str, curves: &[(&Curve, RGBColor)], steps: &Range<f64>) -> Result<()> {
    let values = value_range(curves);
    let mut chart = ChartBuilder::on(area)
        .margin_top(36)
        .margin_right(24)
        .set_label_area_size(LabelAreaPosition::Left, LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, 32)
        .build_cartesian_2d(steps.clone(), values.clone())?;
    let (left, top) = area.get_base_pixel();
    let text = |text: &str, x: i32, y: i32| pixel_font::draw(area, text, (x - left, y - top));
    for y in ticks(&values) {
        chart.draw_series(LineSeries::new([(steps.start, y), (steps.end, y)], GRID))?;
        let (x, pixel) = chart.backend_coord(&(steps.start, y));
        let label = label(y);
        text(&label, x - 8 - pixel_font::width(&label), pixel - pixel_font::HEIGHT / 2)?;
    }
    for x in ticks(steps) {
        chart.draw_series(LineSeries::new([(x, values.start), (x, values.end)], GRID))?;
        let (pixel, y) = chart.backend_coord(&(x, values.start));
        let label = label(x);
        text(&label, pixel - pixel_font::width(&label) / 2, y + 8)?;
    }
    for (curve, color) in curves {
        chart.draw_series(LineSeries::new(curve.iter().copied(), color.stroke_width(2)))?;
        if let [point] = curve.as_slice() {
            chart.draw_series([Circle::new(*point, 3, color.filled())])?;
        }
    }
    text(title, left + LEFT, top + 12)
}

/// All values, and a little room around them.
fn value_range(curves: &[(&Curve, RGBColor)]) -> Range<f64> {
    let all = || curves.iter().flat_map(|(curve, _)| curve.iter().map(|point| point.1));
    let low = all().fold(f64::INFINITY, f64::min);
    let high = all().fold(f64::NEG_INFINITY, f64::max);
    let room = (0.05 * (high - low)).max(1e-3);
    low - room..high + room
}

/// Round numbers inside a range, four to nine of them.
fn ticks(range: &Range<f64>) -> Vec<f64> {
    let span = range.end - range.start;
    let magnitude = 10f64.powf((span / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|multiple| multiple * magnitude)
        .into_iter()
        .find(|step| span / step <= 8.0)
        .unwrap_or(span);
    let first = (range.start / step).ceil() as i64;
    let last = (range.end / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

fn label(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
