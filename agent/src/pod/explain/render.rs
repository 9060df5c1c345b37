//! An explanation for people.

use std::fmt::Write as _;

use super::{Explanation, span};

/// One paragraph per reason.
pub fn render(explanation: &Explanation) -> String {
    let mut out = String::new();
    let e = explanation;
    let state = match (e.well, e.ready, &*e.phase) {
        (true, true, _) => "runs and is ready",
        (true, false, _) => "has done its work",
        (false, _, "Running") => "runs but is not well",
        (false, _, "Failed") => "has failed",
        (false, ..) => "does not run yet",
    };
    let state = match &*e.worker {
        "Terminating" => "is being ended",
        "TearingDown" => "has ended and is being cleaned up",
        "Running" if e.phase == "Running" && !e.ready => "runs but is not ready",
        _ => state,
    };
    let _ = writeln!(out, "pod {}/{} {state}", e.namespace, e.name);
    let source = e.source.as_deref().unwrap_or("nobody any more (orphan)");
    let _ = writeln!(out, "  phase {}, UID {}, wanted by {source}", e.phase, e.uid);
    for reason in &e.reasons {
        let _ = writeln!(out, "\n{}", reason.object);
        let _ = writeln!(out, "  cause: {}", reason.cause);
        let again = match (&reason.retry_in_seconds, &reason.retry_at) {
            (Some(seconds), Some(at)) => format!(" (next in {}, at {at})", span(*seconds)),
            _ => String::new(),
        };
        let _ = writeln!(out, "  next:  {}{again}", reason.next_step);
    }
    if !e.planned.is_empty() {
        let _ = writeln!(out, "\nPLAN");
        for step in &e.planned {
            let _ = writeln!(out, "  {step}");
        }
    }
    if let Some(at) = &e.plans_again_at {
        let _ = writeln!(out, "\nthe agent plans again at {at}, or as soon as something happens");
    }
    out
}
