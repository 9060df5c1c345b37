//! What `longshore top` shows: a status, an order and a size give lines. Pure.

use std::cmp::Reverse;

use clap::ValueEnum;

use crate::health::{PodLine, Status, UsageLine, age, dash, table};

/// Order of the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// Most CPU first.
    Cpu,
    /// Most memory first.
    Memory,
    /// By namespace and name.
    Name,
    /// Most restarts first.
    Restarts,
    /// What is not as it should be first.
    Status,
}

impl Sort {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Memory => "memory",
            Self::Name => "name",
            Self::Restarts => "restarts",
            Self::Status => "status",
        }
    }
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Redraw,
    Sort(Sort),
    Scroll(isize),
    Page(isize),
    Top,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Plain,
    /// Head of a table.
    Head,
    Bold,
    /// Something is wrong.
    Bad,
}

/// A line of the screen. Without control characters: names and messages come from pods and the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) text: String,
    pub(super) look: Look,
}

fn line(text: impl Into<String>, look: Look) -> Line {
    let text = text.into().replace(char::is_control, " ");
    Line { text, look }
}

/// The last status with how it is looked at.
pub(super) struct View {
    status: Status,
    /// Why there is no newer one.
    error: Option<String>,
    sort: Sort,
    scroll: usize,
    /// Pods shown at once, last time.
    page: usize,
}

impl View {
    pub(super) fn new(status: Status, sort: Sort) -> Self {
        Self { status, error: None, sort, scroll: 0, page: 1 }
    }

    /// Takes the next status; without one the last stays, marked as old.
    pub(super) fn take(&mut self, looked: anyhow::Result<Status>) {
        match looked {
            Ok(status) => {
                self.status = status;
                self.error = None;
            }
            Err(error) => self.error = Some(format!("{error:#}")),
        }
    }

    pub(super) fn press(&mut self, key: Key) {
        let by = |lines: isize| self.scroll.saturating_add_signed(lines);
        match key {
            Key::Sort(sort) => (self.sort, self.scroll) = (sort, 0),
            Key::Scroll(lines) => self.scroll = by(lines),
            Key::Page(pages) => self.scroll = by(pages * isize::try_from(self.page).unwrap_or(1)),
            Key::Top => self.scroll = 0,
            Key::Quit | Key::Redraw => {}
        }
    }

    /// Exactly `height` lines, none longer than `width` characters. Services and Events have a
    /// quarter each at most, pods the rest.
    pub(super) fn screen(&mut self, width: usize, height: usize) -> Vec<Line> {
        let status = &self.status;
        let mut lines = head(status);
        if let Some(error) = &self.error {
            lines.push(line(format!("NO NEWS: {error}"), Look::Bad));
        }
        lines.extend(status.errors.iter().take(3).map(|e| line(format!("ERROR {e}"), Look::Bad)));
        let foot = format!(
            "sorted by {}   keys: c CPU, m memory, n name, r restarts, s status; \
             arrows and page keys scroll; q quits",
            self.sort.name()
        );
        let left = height.saturating_sub(lines.len() + 1);
        let (mut services, mut events) = (services(status), events(status));
        shorten(&mut services, left / 4, "Services");
        // The newest Events are the last ones.
        let most = (left / 4).saturating_sub(2);
        if events.len() > most + 1 {
            events.drain(1..events.len() - most);
        }
        let blanks = usize::from(!services.is_empty()) + usize::from(!events.is_empty());
        let room = left.saturating_sub(services.len() + events.len() + blanks);
        let pods = pods(status, self.sort);
        self.page = room.saturating_sub(2).max(1);
        let rows = pods.len() - 1;
        self.scroll = self.scroll.min(rows.saturating_sub(self.page));
        lines.extend(pods[..1].iter().cloned());
        let shown = pods[1..].iter().skip(self.scroll).take(self.page);
        lines.extend(shown.cloned());
        if rows > self.page {
            let last = (self.scroll + self.page).min(rows);
            let text = format!("pods {} to {last} of {rows}", self.scroll + 1);
            lines.push(line(text, Look::Bold));
        }
        for part in [services, events] {
            if !part.is_empty() {
                lines.push(line("", Look::Plain));
                lines.extend(part);
            }
        }
        lines.resize(height.saturating_sub(1), line("", Look::Plain));
        lines.push(line(foot, Look::Bold));
        lines.truncate(height);
        for line in &mut lines {
            if let Some((end, _)) = line.text.char_indices().nth(width) {
                line.text.truncate(end);
            }
        }
        lines
    }
}

/// Everything once, for pipes and files.
pub(super) fn snapshot(status: &Status, sort: Sort) -> String {
    let mut lines = head(status);
    lines.extend(status.errors.iter().map(|e| line(format!("ERROR {e}"), Look::Bad)));
    for part in [pods(status, sort), services(status), events(status)] {
        if !part.is_empty() {
            lines.push(line("", Look::Plain));
            lines.extend(part);
        }
    }
    lines.into_iter().map(|line| line.text + "\n").collect()
}

fn shorten(lines: &mut Vec<Line>, most: usize, what: &str) {
    if lines.len() > most {
        let left_out = lines.len() - most.saturating_sub(1).max(1);
        lines.truncate(most.saturating_sub(1).max(1));
        lines.push(line(format!("... and {left_out} more {what}"), Look::Plain));
    }
}

fn head(status: &Status) -> Vec<Line> {
    let node = &status.node;
    let health = if node.healthy { "healthy" } else { "NOT HEALTHY" };
    let ready = node.ready.as_ref().map(|ready| format!(", Ready={ready}")).unwrap_or_default();
    let text = format!(
        "NODE  {} ({}), {health}{ready}, up {}, CPU {}, memory {}",
        node.name,
        node.mode,
        age(node.uptime_seconds),
        cpu(node.usage),
        memory(node.usage)
    );
    let good = node.healthy && node.ready.as_deref().is_none_or(|ready| ready == "True");
    let mut lines = vec![line(text, if good { Look::Bold } else { Look::Bad })];
    if let Some(proxy) = &status.proxy {
        let synced = if proxy.synced { "in sync" } else { "not in sync yet" };
        let text = format!(
            "PROXY {}, {synced}, {} services, {} endpoints, {} changes pending",
            proxy.mode, proxy.services, proxy.endpoints, proxy.pending
        );
        lines.push(line(text, if proxy.synced { Look::Plain } else { Look::Bad }));
    }
    lines
}

/// Lines of a table: its head, and rows with how they look.
fn rows<const N: usize>(head: [&str; N], body: Vec<([String; N], Look)>) -> Vec<Line> {
    let (cells, looks): (Vec<_>, Vec<_>) = body.into_iter().unzip();
    let mut all = vec![head.map(String::from)];
    // A cell must not end its line.
    all.extend(cells.into_iter().map(|row| row.map(|cell| cell.replace(char::is_control, " "))));
    let looks = std::iter::once(Look::Head).chain(looks);
    table(&all).lines().zip(looks).map(|(text, look)| line(text, look)).collect()
}

fn pods(status: &Status, sort: Sort) -> Vec<Line> {
    let mut pods: Vec<&PodLine> = status.pods.iter().collect();
    pods.sort_by_key(|pod| (pod.namespace.clone(), pod.name.clone()));
    // Stable: what is equal stays in the order of names.
    match sort {
        Sort::Name => {}
        Sort::Cpu => pods.sort_by_key(|pod| Reverse(pod.usage.and_then(|u| u.cpu_nano_cores))),
        Sort::Memory => pods.sort_by_key(|pod| Reverse(pod.usage.map(|u| u.memory_bytes))),
        Sort::Restarts => pods.sort_by_key(|pod| Reverse(pod.restarts)),
        Sort::Status => pods.sort_by_key(|pod| !is_bad(pod)),
    }
    let row = |pod: &&PodLine| {
        let cells = [
            pod.namespace.clone(),
            pod.name.clone(),
            format!("{}/{}", pod.ready, pod.containers),
            pod.status.clone(),
            pod.restarts.to_string(),
            probes(pod),
            cpu(pod.usage),
            memory(pod.usage),
        ];
        (cells, if is_bad(pod) { Look::Bad } else { Look::Plain })
    };
    let head = ["NAMESPACE", "POD", "READY", "STATUS", "RESTARTS", "PROBES", "CPU", "MEMORY"];
    rows(head, pods.iter().map(row).collect())
}

fn is_bad(pod: &PodLine) -> bool {
    pod.phase != "Succeeded" && (pod.ready < pod.containers || pod.phase == "Failed")
}

fn probes(pod: &PodLine) -> String {
    if pod.probed == 0 {
        return "-".into();
    }
    let good = pod.probed.saturating_sub(pod.failing_probes.len());
    let counts = format!("{good}/{}", pod.probed);
    std::iter::once(counts).chain(pod.failing_probes.iter().cloned()).collect::<Vec<_>>().join(" ")
}

fn services(status: &Status) -> Vec<Line> {
    if status.services.is_empty() {
        return Vec::new();
    }
    let mut services: Vec<_> = status.services.iter().collect();
    // Those that lack endpoints must not be the ones for which there is no room.
    services.sort_by_key(|s| (s.ready_endpoints > 0, s.ready_endpoints == s.endpoints));
    let body = services.into_iter().map(|service| {
        let (ready, all) = (service.ready_endpoints, service.endpoints);
        let (health, look) = match (ready, all) {
            (0, 0) => ("none", Look::Bad),
            (0, _) => ("none ready", Look::Bad),
            _ if ready < all => ("some not ready", Look::Plain),
            _ => ("ready", Look::Plain),
        };
        let cells = [
            service.namespace.clone(),
            service.name.clone(),
            dash(service.cluster_ips.join(",")),
            service.ports.join(","),
            format!("{ready}/{all} {health}"),
        ];
        (cells, look)
    });
    rows(["NAMESPACE", "SERVICE", "CLUSTER-IP", "PORTS", "ENDPOINTS"], body.collect())
}

fn events(status: &Status) -> Vec<Line> {
    if status.events.is_empty() {
        return Vec::new();
    }
    let body = status.events.iter().map(|event| {
        let at = event.last.split('.').next().unwrap_or_default().trim_end_matches('Z');
        let cells = [
            at.to_owned(),
            event.object.clone(),
            event.reason.clone(),
            format!("x{}", event.count),
            event.message.clone(),
        ];
        (cells, if event.kind == "Warning" { Look::Bad } else { Look::Plain })
    });
    rows(["LAST EVENTS (UTC)", "OBJECT", "REASON", "COUNT", "MESSAGE"], body.collect())
}

/// Thousandths of a core, as kubectl writes them.
fn cpu(usage: Option<UsageLine>) -> String {
    match usage.and_then(|usage| usage.cpu_nano_cores) {
        Some(nanos) => format!("{}m", nanos.div_ceil(1_000_000)),
        None => "-".into(),
    }
}

fn memory(usage: Option<UsageLine>) -> String {
    match usage {
        Some(usage) => format!("{}Mi", usage.memory_bytes.div_ceil(1 << 20)),
        None => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::{EventLine, ServiceLine};

    fn pod(name: &str, cpu: Option<u64>, mebibytes: u64, restarts: i32, ready: usize) -> PodLine {
        PodLine {
            namespace: "d".into(),
            name: name.into(),
            status: "Running".into(),
            phase: "Running".into(),
            ready,
            containers: 1,
            restarts,
            usage: Some(UsageLine {
                cpu_nano_cores: cpu.map(|milli| milli * 1_000_000),
                memory_bytes: mebibytes << 20,
            }),
            ..PodLine::default()
        }
    }

    fn status() -> Status {
        Status {
            pods: vec![
                pod("calm", Some(1), 30, 0, 1),
                pod("busy", Some(250), 10, 1, 1),
                pod("new", None, 20, 7, 0),
            ],
            ..Status::default()
        }
    }

    #[test]
    fn pods_are_sorted_as_asked() {
        for (sort, order) in [
            (Sort::Cpu, ["busy", "calm", "new"]),
            (Sort::Memory, ["calm", "new", "busy"]),
            (Sort::Name, ["busy", "calm", "new"]),
            (Sort::Restarts, ["new", "busy", "calm"]),
            (Sort::Status, ["new", "busy", "calm"]),
        ] {
            let lines = pods(&status(), sort);
            let names = lines[1..].iter().map(|l| l.text.split_whitespace().nth(1).unwrap());
            assert_eq!(names.collect::<Vec<_>>(), order, "{sort:?}");
        }
        let lines = pods(&status(), Sort::Cpu);
        assert!(lines[1].text.ends_with("250m   10Mi"), "{lines:?}");
        assert!(lines[3].text.ends_with("-      20Mi"), "{lines:?}");
        assert_eq!((lines[1].look, lines[3].look), (Look::Plain, Look::Bad));
    }

    #[test]
    fn probes_tell_who_fails() {
        let mut one = pod("a", None, 1, 0, 0);
        assert_eq!(probes(&one), "-");
        one.probed = 2;
        assert_eq!(probes(&one), "2/2");
        one.failing_probes = vec!["web/readiness".into()];
        assert_eq!(probes(&one), "1/2 web/readiness");
    }

    #[test]
    fn a_screen_has_its_size_whatever_is_to_be_shown() {
        let mut full = status();
        full.pods.extend((0..200).map(|n| pod(&format!("p{n:03}"), Some(5), 1, 0, 1)));
        full.services.extend((0..50).map(|n| ServiceLine {
            name: format!("s{n}"),
            ready_endpoints: usize::from(n != 49),
            endpoints: 1,
            ..ServiceLine::default()
        }));
        full.events.extend((0..100).map(|n| EventLine {
            object: format!("Pod d/e{n}"),
            message: "two\nlines \u{1b}[31m and äöü".repeat(20),
            ..EventLine::default()
        }));
        full.errors = (0..9).map(|n| format!("error {n}")).collect();
        for status in [Status::default(), full] {
            let mut view = View::new(status, Sort::Cpu);
            for (width, height) in [(0, 0), (1, 1), (20, 5), (80, 24), (300, 100), (80, 3)] {
                for key in [Key::Page(1), Key::Scroll(-3), Key::Scroll(100_000), Key::Top] {
                    let lines = view.screen(width, height);
                    assert_eq!(lines.len(), height);
                    assert!(lines.iter().all(|l| l.text.chars().count() <= width));
                    assert!(!lines.iter().any(|l| l.text.contains(char::is_control)), "{lines:?}");
                    view.press(key);
                }
            }
        }
    }

    #[test]
    fn what_matters_most_has_room() {
        let mut status = status();
        status.pods.extend((0..200).map(|n| pod(&format!("p{n:03}"), Some(5), 1, 0, 1)));
        status.services = (0..50)
            .map(|n| ServiceLine {
                name: format!("s{n}"),
                ready_endpoints: usize::from(n != 49),
                endpoints: 1,
                ..ServiceLine::default()
            })
            .collect();
        status.events = (0..100)
            .map(|n| EventLine { object: format!("Pod d/e{n}"), ..EventLine::default() })
            .collect();
        let mut view = View::new(status, Sort::Cpu);
        let text = |view: &mut View| -> String {
            view.screen(120, 40).into_iter().map(|l| l.text + "\n").collect()
        };
        let first = text(&mut view);
        for shown in ["busy", "s49 ", "0/1 none ready", "more Services", "d/e99 ", "sorted by CPU"]
        {
            assert!(first.contains(shown), "{shown}:\n{first}");
        }
        assert!(!first.contains("d/e0 "), "{first}");
        view.press(Key::Page(1));
        let second = text(&mut view);
        assert!(!second.contains("busy"), "{second}");
        // Past the end is the end.
        view.press(Key::Scroll(isize::MAX));
        assert!(text(&mut view).contains("of 203"));
        assert!(text(&mut view).contains(" new "));
        // Without an answer the last one stays, and says that it is old.
        view.take(Err(anyhow::anyhow!("no answer in time")));
        assert!(text(&mut view).contains("NO NEWS: no answer in time"));
        view.take(Ok(Status::default()));
        assert!(!text(&mut view).contains("NO NEWS"));
    }
}
