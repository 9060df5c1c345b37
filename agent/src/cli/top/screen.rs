//! The terminal: taken whole, drawn anew on news, keys and resizes, and given back as it was, also
//! after a signal, an error or a panic.

use std::io::{self, Write};
use std::time::Duration;

use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::style::{Attribute, Color, ResetColor, SetAttribute, SetForegroundColor};
use crossterm::terminal::{
    Clear, ClearType, DisableLineWrap, EnableLineWrap, EnterAlternateScreen, LeaveAlternateScreen,
};
use crossterm::{cursor, execute, queue, terminal};
use futures::StreamExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::Source;
use super::view::{Key, Line, Look, Sort, View};

/// The terminal while it is ours.
struct Screen;

impl Screen {
    fn take() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        // From here on the end of `screen` gives it back.
        let screen = Self;
        execute!(io::stdout(), EnterAlternateScreen, cursor::Hide, DisableLineWrap)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    // The terminal may be gone; then there is nothing to restore.
    let _ = execute!(
        io::stdout(),
        ResetColor,
        SetAttribute(Attribute::Reset),
        EnableLineWrap,
        cursor::Show,
        LeaveAlternateScreen
    );
    let _ = terminal::disable_raw_mode();
}

fn key(event: KeyEvent) -> Option<Key> {
    if event.kind == KeyEventKind::Release {
        return None;
    }
    let control = event.modifiers.contains(KeyModifiers::CONTROL);
    Some(match event.code {
        KeyCode::Char('c' | 'd') if control => Key::Quit,
        KeyCode::Char('l') if control => Key::Redraw,
        _ if control => return None,
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => Key::Quit,
        KeyCode::Char('c' | 'C') => Key::Sort(Sort::Cpu),
        KeyCode::Char('m' | 'M') => Key::Sort(Sort::Memory),
        KeyCode::Char('n' | 'N') => Key::Sort(Sort::Name),
        KeyCode::Char('r' | 'R') => Key::Sort(Sort::Restarts),
        KeyCode::Char('s' | 'S') => Key::Sort(Sort::Status),
        KeyCode::Up | KeyCode::Char('k') => Key::Scroll(-1),
        KeyCode::Down | KeyCode::Char('j') => Key::Scroll(1),
        KeyCode::PageUp => Key::Page(-1),
        KeyCode::PageDown | KeyCode::Char(' ') => Key::Page(1),
        KeyCode::Home | KeyCode::Char('g') => Key::Top,
        _ => return None,
    })
}

fn draw(lines: &[Line], all: bool) -> io::Result<()> {
    // One write, so that no half-drawn screen is seen.
    let mut out = Vec::new();
    if all {
        queue!(out, Clear(ClearType::All))?;
    }
    for (row, line) in lines.iter().enumerate() {
        queue!(out, cursor::MoveTo(0, u16::try_from(row).unwrap_or(u16::MAX)))?;
        match line.look {
            Look::Plain => {}
            Look::Head => queue!(out, SetAttribute(Attribute::Reverse))?,
            Look::Bold => queue!(out, SetAttribute(Attribute::Bold))?,
            Look::Bad => queue!(out, SetForegroundColor(Color::Red))?,
        }
        out.extend_from_slice(line.text.as_bytes());
        queue!(out, SetAttribute(Attribute::Reset), ResetColor, Clear(ClearType::UntilNewLine))?;
    }
    queue!(out, Clear(ClearType::FromCursorDown))?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&out)?;
    stdout.flush()
}

/// Shows the node until a key or a signal ends it.
pub(super) async fn live(source: Source, every: Duration, sort: Sort) -> anyhow::Result<()> {
    // A node that does not run is an error like any other command's, not a screen.
    let mut view = View::new(source.look().await?, sort);
    let mut ends = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()]
        .map(signal)
        .into_iter()
        .collect::<io::Result<Vec<_>>>()?;
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        give_back();
        before(info);
    }));
    let screen = Screen::take()?;
    let mut keys = EventStream::new();
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + super::BETWEEN, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looks = JoinSet::new();
    let mut all = true;
    loop {
        let (width, height) = terminal::size()?;
        draw(&view.screen(width.into(), height.into()), std::mem::take(&mut all))?;
        let ended = futures::future::select_all(ends.iter_mut().map(|s| Box::pin(s.recv())));
        tokio::select! {
            event = keys.next() => match event {
                Some(Ok(Event::Key(event))) => match key(event) {
                    Some(Key::Quit) => break,
                    Some(Key::Redraw) => all = true,
                    Some(key) => view.press(key),
                    None => {}
                },
                Some(Ok(Event::Resize(..))) => all = true,
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
                None => break,
            },
            // One look at a time: a node that hangs is not asked again and again.
            _ = ticks.tick(), if looks.is_empty() => {
                let source = source.clone();
                looks.spawn(async move { source.look().await });
            }
            Some(looked) = looks.join_next(), if !looks.is_empty() => {
                view.take(looked.map_err(anyhow::Error::from).and_then(|looked| looked));
            }
            _ = ended => break,
        }
    }
    drop(screen);
    Ok(())
}
