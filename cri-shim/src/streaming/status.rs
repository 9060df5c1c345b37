//! What the error stream of exec and attach says at the end: a `Status` object from protocol v4 on,
//! plain text for people before.

use serde::Serialize;

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// The command ended with another exit code than 0.
    ExitCode {
        command: Vec<String>,
        code: i32,
    },
    /// The session could not be had.
    Failed(String),
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    metadata: Empty,
    status: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Default, Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Details {
    causes: [Cause; 1],
}

#[derive(Serialize)]
struct Cause {
    reason: &'static str,
    message: String,
}

/// The bytes of the error stream in a version of the protocol; empty where silence is success.
pub fn encode(outcome: &Outcome, version: u8) -> Vec<u8> {
    let message = match outcome {
        Outcome::Success => String::new(),
        Outcome::ExitCode { command, code } => format!(
            "command terminated with non-zero exit code: error executing command [{}], exit code {code}",
            command.join(" ")
        ),
        Outcome::Failed(why) => format!("Internal error occurred: {why}"),
    };
    if version < 4 {
        return message.into_bytes();
    }
    let status = match outcome {
        Outcome::Success => Status { status: "Success", ..Status::default() },
        Outcome::ExitCode { code, .. } => Status {
            status: "Failure",
            message,
            reason: Some("NonZeroExitCode"),
            details: Some(Details {
                causes: [Cause { reason: "ExitCode", message: code.to_string() }],
            }),
            ..Status::default()
        },
        Outcome::Failed(_) => Status {
            status: "Failure",
            message,
            reason: Some("InternalError"),
            code: Some(500),
            ..Status::default()
        },
    };
    // Plain strings and numbers always have a JSON form.
    serde_json::to_vec(&status).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_told_as_clients_look_for_them() {
        let outcome = Outcome::ExitCode { command: vec!["sh".into(), "-c".into()], code: 7 };
        let json: serde_json::Value = serde_json::from_slice(&encode(&outcome, 4)).unwrap();
        assert_eq!(json["status"], "Failure");
        assert_eq!(json["reason"], "NonZeroExitCode");
        assert_eq!(json["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(json["details"]["causes"][0]["message"], "7");
        let text = String::from_utf8(encode(&outcome, 1)).unwrap();
        assert!(text.ends_with("error executing command [sh -c], exit code 7"), "{text}");
    }

    #[test]
    fn success_is_silent_before_v4() {
        assert!(encode(&Outcome::Success, 3).is_empty());
        assert_eq!(encode(&Outcome::Success, 5), br#"{"metadata":{},"status":"Success"}"#);
        let failed = encode(&Outcome::Failed("no".into()), 4);
        let json: serde_json::Value = serde_json::from_slice(&failed).unwrap();
        assert_eq!(
            (json["reason"].as_str(), json["code"].as_i64()),
            (Some("InternalError"), Some(500))
        );
    }
}
