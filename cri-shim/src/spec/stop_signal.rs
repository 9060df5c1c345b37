//! The signal a container is asked to stop with: the pod's, else the image's, else SIGTERM.

use std::str::FromStr;

use nix::sys::signal::Signal;

use crate::api;

/// Real-time signals are numbered from here in every libc Linux containers use (kernel `SIGRTMIN`
/// is 32; glibc and musl keep the first ones).
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number of the signal to send.
pub fn plan(config: &api::ContainerConfig, image_signal: &str) -> i32 {
    let asked = config.stop_signal();
    if asked != api::Signal::RuntimeDefault
        && let Some(number) = parse(asked.as_str_name())
    {
        return number;
    }
    parse(image_signal).unwrap_or(libc::SIGTERM)
}

/// Reads `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, and the CRI's `SIGRTMINPLUS3`.
pub fn parse(text: &str) -> Option<i32> {
    let text = text.trim().to_ascii_uppercase();
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return offset(rest, "PLUS", '+').map(|n| RTMIN + n).filter(|n| *n <= RTMAX);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return offset(rest, "MINUS", '-').map(|n| RTMAX - n).filter(|n| *n >= RTMIN);
    }
    let name = match name {
        "CLD" => "CHLD",
        "POLL" => "IO",
        "IOT" => "ABRT",
        other => other,
    };
    Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32)
}

fn offset(rest: &str, word: &str, sign: char) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    rest.strip_prefix(word).or_else(|| rest.strip_prefix(sign))?.parse().ok()
}
