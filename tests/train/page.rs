//! The page of a run: one file, well-formed, whose pictures and plots a browser shows.

use crate::common::finetune::{finetune, SHORT};
use roxmltree::{Document, ParsingOptions};
use std::path::Path;
use std::process::Command;

/// Counts what is shown: pictures with pixels, plots with a size, and whatever the page asks of elsewhere.
const LOOK: &str = "<script>addEventListener('load', () => {
  const pictures = [...document.images].filter(i => i.complete && i.naturalWidth > 500).length;
  const plots = [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 300).length;
  const asked = performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length;
  document.body.setAttribute('data-seen', `${pictures} pictures, ${plots} plots, ${asked} asked for`);
})</script>";

/// A browser, if this machine has one.
fn browser() -> Option<&'static str> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let runs = |name: &&str| {
        Command::new(name).arg("--version").output().is_ok_and(|found| found.status.success())
    };
    names.into_iter().find(runs)
}

#[test]
fn a_run_is_on_one_page() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("run");
    let arguments = ["--steps", "4", "--eval-every", "2", "--overlays", "2", "--automatic", "6"];
    let outcome = finetune(&output, &[&SHORT[..], &arguments].concat())?;
    let page = std::fs::read_to_string(output.join("report.html"))?;
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    let document = Document::parse_with_options(&page, options)?;
    let count = |name: &str| document.descendants().filter(|n| n.tag_name().name() == name).count();
    // Two images with and without prompts; loss, evaluations and calibration.
    assert_eq!((count("img"), count("svg"), count("tr")), (4, 3, 11));
    let masks = outcome.after.masks.expect("automatic masks");
    for value in [outcome.before.objects.iou, outcome.after.objects.iou_at_5, masks.ap] {
        assert!(page.contains(&format!("<td>{value:.4}</td>")), "{value}");
    }
    for node in document.descendants() {
        for attribute in node.attributes().filter(|a| ["src", "href"].contains(&a.name())) {
            assert!(attribute.value().starts_with("data:image/png;base64,"));
        }
    }
    for file in [
        "automatic/nuclei_r6c0.png",
        "overlays/nuclei_r6c1.png",
        "automatic.png",
        "calibration.png",
    ] {
        assert!(image::open(output.join(file))?.width() > 500, "{file}");
    }
    match browser() {
        Some(browser) => {
            assert_eq!(seen(browser, &page, folder.path())?, "4 pictures, 3 plots, 0 asked for")
        }
        None => println!("this machine has no browser: the page was parsed, not opened"),
    }
    Ok(())
}

/// Counts of the things that a browser sees on the page.
fn seen(browser: &str, page: &str, folder: &Path) -> anyhow::Result<String> {
    let file = folder.join("looked-at.html");
    std::fs::write(&file, page.replace("</body>", &format!("{LOOK}</body>")))?;
    let profile = format!("--user-data-dir={}", folder.join("profile").display());
    let found = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ])
        .args([profile, format!("file://{}", file.display())])
        .output()?;
    let dom = String::from_utf8_lossy(&found.stdout);
    let shown = dom.split("data-seen=\"").nth(1).and_then(|rest| rest.split('"').next());
    let said = String::from_utf8_lossy(&found.stderr);
    shown.map(str::to_string).ok_or_else(|| anyhow::anyhow!("the browser showed nothing: {said}"))
}
