//! The form of a profile: pprof's `profile.proto` in gzip.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;

use super::Counted;
use super::image::Images;

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    mapping: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
    #[prost(int64, repeated, tag = "13")]
    comment: Vec<i64>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    str: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    memory_start: u64,
    #[prost(uint64, tag = "3")]
    memory_limit: u64,
    #[prost(uint64, tag = "4")]
    file_offset: u64,
    #[prost(int64, tag = "5")]
    filename: i64,
    #[prost(int64, tag = "6")]
    build_id: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping_id: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
}

/// Numbers of strings; the empty one is number 0.
struct Strings(BTreeMap<String, i64>);

impl Strings {
    fn of(&mut self, text: &str) -> i64 {
        if let Some(number) = self.0.get(text) {
            return *number;
        }
        let number = self.0.len() as i64;
        self.0.insert(text.to_owned(), number);
        number
    }

    fn table(self) -> Vec<String> {
        let mut table = vec![String::new(); self.0.len()];
        for (text, number) in self.0 {
            table[number as usize] = text;
        }
        table
    }
}

/// Encodes what was counted; `started` in nanoseconds since the epoch.
pub(super) fn encode(
    counted: &Counted,
    images: &Images,
    started: i128,
    lasted: Duration,
    period: Duration,
) -> Vec<u8> {
    let mut strings = Strings(BTreeMap::from([(String::new(), 0)]));
    let mut value_type = |kind, unit| ValueType { kind: strings.of(kind), unit: strings.of(unit) };
    let samples = value_type("samples", "count");
    let cpu = value_type("cpu", "nanoseconds");
    let thread_key = strings.of("thread");
    let mut profile = Profile {
        sample_type: vec![samples, cpu],
        time_nanos: started as i64,
        duration_nanos: lasted.as_nanos() as i64,
        period_type: Some(cpu),
        period: period.as_nanos() as i64,
        ..Profile::default()
    };
    for (at, image) in images.all().iter().enumerate() {
        profile.mapping.push(Mapping {
            id: at as u64 + 1,
            memory_start: image.start,
            memory_limit: image.end,
            file_offset: image.offset,
            filename: strings.of(&image.file),
            build_id: strings.of(&image.build_id),
            has_functions: image.has_names(),
        });
    }
    let (mut locations, mut functions) = (BTreeMap::new(), BTreeMap::new());
    for ((thread, stack), count) in &counted.stacks {
        let mut ids = Vec::with_capacity(stack.len());
        for address in stack {
            let next = locations.len() as u64 + 1;
            ids.push(*locations.entry(*address).or_insert_with(|| {
                let line = images.name(*address).map(|name| {
                    let id = functions.len() as u64 + 1;
                    let name = strings.of(&name);
                    let function_id = *functions.entry(name).or_insert_with(|| {
                        profile.function.push(Function { id, name, system_name: name });
                        id
                    });
                    Line { function_id }
                });
                profile.location.push(Location {
                    id: next,
                    mapping_id: images.image_of(*address).map_or(0, |at| at as u64 + 1),
                    address: *address,
                    line: line.into_iter().collect(),
                });
                next
            }));
        }
        profile.sample.push(Sample {
            location_id: ids,
            value: vec![*count as i64, *count as i64 * profile.period],
            label: vec![Label { key: thread_key, str: strings.of(thread) }],
        });
    }
    if counted.lost > 0 {
        profile.comment.push(strings.of(&format!("{} samples were lost", counted.lost)));
    }
    profile.string_table = strings.table();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing to memory does not fail.
    let _ = gzip.write_all(&profile.encode_to_vec());
    gzip.finish().unwrap_or_default()
}

/// A profile as its readers see it.
#[cfg(test)]
pub(crate) struct Read {
    pub(crate) types: Vec<(String, String)>,
    pub(crate) period: i64,
    /// Thread, names from the innermost, values.
    pub(crate) stacks: Vec<(String, Vec<String>, Vec<i64>)>,
}

#[cfg(test)]
pub(crate) fn read(gzip: &[u8]) -> Read {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(gzip).read_to_end(&mut bytes).unwrap();
    let profile = Profile::decode(bytes.as_slice()).unwrap();
    let text = |number: i64| profile.string_table[number as usize].clone();
    let name = |id: &u64| {
        let location = profile.location.iter().find(|location| location.id == *id).unwrap();
        assert!(location.mapping_id as usize <= profile.mapping.len());
        let Some(line) = location.line.first() else { return format!("{:#x}", location.address) };
        text(profile.function.iter().find(|f| f.id == line.function_id).unwrap().name)
    };
    Read {
        types: profile.sample_type.iter().map(|t| (text(t.kind), text(t.unit))).collect(),
        period: profile.period,
        stacks: profile
            .sample
            .iter()
            .map(|sample| {
                let names = sample.location_id.iter().map(name).collect();
                (text(sample.label[0].str), names, sample.value.clone())
            })
            .collect(),
    }
}
