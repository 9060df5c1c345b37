//! Prometheus' text format (0.0.4), with times where a sample has one. Pure.

use std::fmt::Write as _;

/// Content type of the format.
pub(in crate::node_api) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What kind of a metric it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::node_api) enum Kind {
    Counter,
    Gauge,
}

struct Family {
    name: &'static str,
    samples: String,
    help: &'static str,
    kind: Kind,
}

/// Samples by metric, in the order in which the metrics came first.
#[derive(Default)]
pub(in crate::node_api) struct Exposition(Vec<Family>);

impl Exposition {
    /// Adds a sample; `millis` is its time.
    pub(in crate::node_api) fn sample(
        &mut self,
        (name, kind, help): (&'static str, Kind, &'static str),
        labels: &[(&str, &str)],
        value: f64,
        millis: Option<i64>,
    ) {
        let at = self.0.iter().position(|family| family.name == name).unwrap_or_else(|| {
            self.0.push(Family { name, samples: String::new(), help, kind });
            self.0.len() - 1
        });
        let out = &mut self.0[at].samples;
        out.push_str(name);
        for (n, (label, value)) in labels.iter().enumerate() {
            let _ = write!(out, "{}{label}=\"", if n == 0 { '{' } else { ',' });
            for c in value.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '"' => out.push_str("\\\""),
                    '\n' => out.push_str("\\n"),
                    c => out.push(c),
                }
            }
            out.push('"');
        }
        if !labels.is_empty() {
            out.push('}');
        }
        let _ = write!(out, " {value}");
        if let Some(millis) = millis {
            let _ = write!(out, " {millis}");
        }
        out.push('\n');
    }

    /// The text.
    pub(in crate::node_api) fn render(self) -> String {
        let mut out = String::new();
        for Family { name, samples, help, kind } in self.0 {
            let kind = if kind == Kind::Counter { "counter" } else { "gauge" };
            let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        out
    }
}

/// OpenMetrics text, as the metrics library writes it, in the older format that every scraper takes.
pub(in crate::node_api) fn classic(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    let mut name_help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        if let Some(rest) = line.strip_prefix("# HELP ") {
            name_help = rest.split_once(' ');
            continue;
        }
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let help = name_help.take().filter(|(of, _)| *of == name).map_or("", |(_, help)| help);
            let _ = writeln!(out, "# HELP {name}{suffix} {help}");
            let _ = writeln!(
                out,
                "# TYPE {name}{suffix} {}",
                if kind == "unknown" { "untyped" } else { kind }
            );
            continue;
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stand_with_their_metric() {
        let mut text = Exposition::default();
        let a = ("a_total", Kind::Counter, "How many.");
        text.sample(a, &[("x", "1"), ("y", "q\"\\\n")], 1.5, Some(1000));
        text.sample(("b", Kind::Gauge, "Now."), &[], 2.0, None);
        text.sample(a, &[("x", "2")], 3e9, None);
        assert_eq!(
            text.render(),
            "# HELP a_total How many.\n# TYPE a_total counter\n\
             a_total{x=\"1\",y=\"q\\\"\\\\\\n\"} 1.5 1000\na_total{x=\"2\"} 3000000000\n\
             # HELP b Now.\n# TYPE b gauge\nb 2\n"
        );
    }

    #[test]
    fn open_metrics_reads_as_the_older_format() {
        let open = "# HELP a How many.\n# TYPE a counter\na_total{x=\"1\"} 1\n# EOF\n";
        let expected = "# HELP a_total How many.\n# TYPE a_total counter\na_total{x=\"1\"} 1\n";
        assert_eq!(classic(open), expected);
    }
}
