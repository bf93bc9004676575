//! A run on one HTML page, which holds its plots and pictures and needs no other file and no network.

use super::super::draw::png;
use super::pictures::side_by_side;
use super::plots::Plot;
use super::report::Outcome;
use base64::prelude::{Engine, BASE64_STANDARD};
use image::RgbImage;
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse}td,th{padding:.2em .9em;text-align:right;border-bottom:1px solid #ddd}\
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}\
.sheet{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0}figure img{width:440px;max-width:100%}\
figcaption{font-size:13px;color:#555}pre{white-space:pre-wrap;font-size:13px;background:#f5f5f5;padding:1em}";

/// The contents of a page.
pub struct Page<'a> {
    /// The results.
    pub outcome: &'a Outcome,
    /// Lines of what was trained on what.
    pub facts: &'a [String],
    /// The curves.
    pub plots: &'a [Plot],
    /// Pictures of images by name: the prompted masks and those found without a prompt, each before and after.
    pub images: &'a [(String, Vec<[RgbImage; 2]>)],
}

impl Page<'_> {
    /// The page's text.
    ///
    /// # Errors
    /// - a plot cannot be drawn, or a picture not be written.
    pub fn html(&self) -> anyhow::Result<String> {
        let mut page = String::new();
        write!(
            page,
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"/><title>A run of finetune</title>\n\
             <style>{STYLE}</style></head>\n<body>\n<h1>A run of <code>finetune</code></h1>\n<h2>Held-out images</h2>\n{}",
            self.table()?
        )?;
        for plot in self.plots {
            writeln!(page, "{}", plot.svg()?)?;
        }
        let sections = [
            ("Prompted masks", "One point or box an object, in white; the truth's outlines, too."),
            (
                "Automatic masks",
                "Found without a prompt. Shown are those whose score reaches the cut of the best segmentation accuracy; \
                 the truth is outlined in white.",
            ),
        ];
        for (kind, (title, explained)) in sections.into_iter().enumerate() {
            if self.images.iter().all(|(_, pictures)| pictures.len() <= kind) {
                continue;
            }
            writeln!(
                page,
                "<h2>{title}</h2>\n<p>{explained} Before on the left, after on the right.</p>"
            )?;
            writeln!(page, "<div class=\"sheet\">")?;
            for (name, pictures) in self.images {
                let Some([before, after]) = pictures.get(kind) else { continue };
                let data = BASE64_STANDARD.encode(png(&side_by_side(before, after).into())?);
                let name = escaped(name);
                writeln!(
                    page,
                    "<figure><img alt=\"{title} of {name}\" src=\"data:image/png;base64,{data}\"/>\
                     <figcaption>{name}</figcaption></figure>"
                )?;
            }
            writeln!(page, "</div>")?;
        }
        let facts = escaped(&self.facts.join("\n"));
        writeln!(page, "<h2>The run</h2>\n<pre>{facts}</pre>\n</body>\n</html>")?;
        Ok(page)
    }

    /// The measures before and after.
    fn table(&self) -> Result<String, std::fmt::Error> {
        let Outcome { before, after, .. } = self.outcome;
        let mut rows = "<table>\n<tr><th></th><th>before</th><th>after</th></tr>\n".to_string();
        let names = [
            "IoU, one prompt",
            "Dice",
            "F1 of boundaries",
            "IoU, 3 prompts",
            "IoU, 5 prompts",
            "predicted IoU off by",
            "AP of automatic masks, IoU 0.5 to 0.95",
            "AP of automatic masks, IoU 0.5",
            "segmentation accuracy of automatic masks",
            "cut of the score for it",
        ];
        for (name, (before, after)) in names.iter().zip(before.values().iter().zip(after.values()))
        {
            if let (Some(before), Some(after)) = (before, after) {
                writeln!(rows, "<tr><td>{name}</td><td>{before:.4}</td><td>{after:.4}</td></tr>")?;
            }
        }
        Ok(rows + "</table>\n")
    }
}

fn escaped(text: &str) -> String {
    let mut safe = String::new();
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            letter => safe.push(letter),
        }
    }
    safe
}
