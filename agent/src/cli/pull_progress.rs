//! What `longshore image pull` shows while it waits: a bar on a terminal, a line a layer elsewhere,
//! one JSON object a change for machines. All of it goes to standard error; the result alone goes
//! to standard output.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};

use cri_shim::image::{LayerState, PullProgress};

use super::Output;

/// Characters of the bar itself.
const BAR: usize = 30;

/// The display of one pull.
pub(super) struct Progress {
    style: Style,
    /// Lines that are told once, and the last JSON.
    told: BTreeSet<String>,
    last: Option<PullProgress>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Bar,
    Lines,
    Json,
}

impl Progress {
    pub(super) fn new(output: Output) -> Self {
        let style = match output {
            Output::Json => Style::Json,
            Output::Text if std::io::stderr().is_terminal() => Style::Bar,
            Output::Text => Style::Lines,
        };
        Self { style, told: BTreeSet::new(), last: None }
    }

    /// Shows how far the pull is.
    pub(super) fn show(&mut self, now: &PullProgress) {
        let text = match self.style {
            Style::Bar => format!("\r\x1b[2K{}", bar(now)),
            Style::Lines => self.new_lines(now),
            Style::Json => self.json(now),
        };
        // Nobody who looks is no reason to stop a pull.
        let mut out = std::io::stderr().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    /// Leaves the line to what follows.
    pub(super) fn end(&self) {
        if self.style == Style::Bar {
            let _ = std::io::stderr().lock().write_all(b"\r\x1b[2K");
        }
    }

    fn new_lines(&mut self, now: &PullProgress) -> String {
        let mut lines = String::new();
        for layer in &now.layers {
            let state = match layer.state {
                LayerState::Waiting => continue,
                LayerState::Pulling => "pulling",
                LayerState::Done if layer.received == 0 => "already there",
                LayerState::Done => "done",
            };
            let line = format!("{} {state}, {}\n", short(&layer.digest), size(layer.size));
            if self.told.insert(line.clone()) {
                lines.push_str(&line);
            }
        }
        lines
    }

    fn json(&mut self, now: &PullProgress) -> String {
        let same = self.last.as_ref().is_some_and(|last| last.layers == now.layers);
        self.last = Some(now.clone());
        match serde_json::to_string(now) {
            Ok(text) if !same => text + "\n",
            _ => String::new(),
        }
    }
}

/// One line: the bar, bytes, layers, rate.
fn bar(now: &PullProgress) -> String {
    if now.layers.is_empty() {
        return "resolving".to_owned();
    }
    let total: u64 = now.layers.iter().map(|layer| layer.size).sum();
    let done = |layer: &cri_shim::image::LayerProgress| match layer.state {
        LayerState::Done => layer.size,
        _ => layer.received.min(layer.size),
    };
    let have: u64 = now.layers.iter().map(done).sum();
    let received: u64 = now.layers.iter().map(|layer| layer.received).sum();
    let whole = now.layers.iter().filter(|layer| layer.state == LayerState::Done).count();
    let filled = usize::try_from(have * BAR as u64 / total.max(1)).unwrap_or(0).min(BAR);
    format!(
        "[{}{}] {:3} %  {} of {}  {whole}/{} layers  {}/s",
        "#".repeat(filled),
        "-".repeat(BAR - filled),
        have * 100 / total.max(1),
        size(have),
        size(total),
        now.layers.len(),
        size((received as f64 / now.seconds.max(0.1)) as u64),
    )
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use cri_shim::image::LayerProgress;

    use super::*;

    fn layer(digest: &str, received: u64, state: LayerState) -> LayerProgress {
        LayerProgress { digest: format!("sha256:{digest}"), received, size: 10_000_000, state }
    }

    fn example() -> PullProgress {
        PullProgress {
            reference: "x".into(),
            layers: vec![
                layer("aaaaaaaaaaaaaaaa", 0, LayerState::Done),
                layer("bbbbbbbbbbbbbbbb", 5_000_000, LayerState::Pulling),
                layer("cccccccccccccccc", 0, LayerState::Waiting),
            ],
            seconds: 2.0,
        }
    }

    #[test]
    fn the_bar_says_how_far_it_is() {
        let mut now = example();
        assert_eq!(
            bar(&now),
            "[###############---------------]  50 %  15.0 MB of 30.0 MB  1/3 layers  2.5 MB/s"
        );
        now.layers.clear();
        assert_eq!(bar(&now), "resolving");
    }

    #[test]
    fn lines_come_once() {
        let mut shown = Progress { style: Style::Lines, told: BTreeSet::new(), last: None };
        let lines = shown.new_lines(&example());
        assert_eq!(lines, "aaaaaaaaaaaa already there, 10.0 MB\nbbbbbbbbbbbb pulling, 10.0 MB\n");
        let mut now = example();
        assert_eq!(shown.new_lines(&now), "");
        now.layers[1].state = LayerState::Done;
        assert_eq!(shown.new_lines(&now), "bbbbbbbbbbbb done, 10.0 MB\n");
        assert!(!shown.json(&now).contains("\"state\":\"pulling\""));
        assert_eq!(shown.json(&now), "");
    }
}
