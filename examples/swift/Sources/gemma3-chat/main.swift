import Dispatch
import Foundation
import Gemma3

// gemma3-chat MODEL: reads a line, streams the answer. /image PATH shows a picture with the next line, /quit ends it,
// and so does Ctrl-D. Ctrl-C ends an answer, and the program where there is none.

func complain(_ words: String) { FileHandle.standardError.write(Data("\(words)\n".utf8)) }

func say(_ words: String) { FileHandle.standardOutput.write(Data(words.utf8)) }

/// What Ctrl-C ends.
final class Interrupt: @unchecked Sendable {
    private let lock = NSLock()
    private var answer: Task<Void, Error>?
    private let source: DispatchSourceSignal

    /// `quit` is done where no answer is in work.
    init(quit: @escaping @Sendable () -> Void) {
        signal(SIGINT, SIG_IGN)  // the source below hears of it all the same
        source = DispatchSource.makeSignalSource(signal: SIGINT, queue: .global())
        source.setEventHandler { [unowned self] in
            if let answer = lock.withLock({ self.answer }) { answer.cancel() } else { quit() }
        }
        source.resume()
    }

    /// Wait for an answer that Ctrl-C may cancel.
    func during(_ answer: Task<Void, Error>) async throws {
        set(answer)
        defer { set(nil) }
        try await answer.value
    }

    private func set(_ answer: Task<Void, Error>?) { lock.withLock { self.answer = answer } }
}

/// Print an answer as it comes, and how it ended if not by itself.
func show(_ answer: Gemma3Answer) async throws {
    for try await event in answer {
        switch event {
        case .progress: break
        case .text(let text): say(text)
        case .done(_, let reason, _, _): say(reason == "stop" ? "\n" : "\n[\(reason)]\n")
        }
    }
    if Task.isCancelled { say("\n[cancelled]\n") }
}

func chat(_ model: String) async throws {
    let interrupt = Interrupt(quit: { _exit(130) })
    let engine = try await Gemma3Engine(model)
    let session = try await engine.session()
    var pictures: [Data] = []
    let prompt = isatty(STDIN_FILENO) == 1 ? "> " : ""
    while true {
        say(prompt)
        guard let line = readLine()?.trimmingCharacters(in: .whitespaces), line != "/quit" else { break }
        do {
            if line.hasPrefix("/image ") {
                let path = line.dropFirst("/image ".count).trimmingCharacters(in: .whitespaces)
                if let data = FileManager.default.contents(atPath: path) {
                    pictures.append(data)
                } else {
                    complain("\(path): no file that can be read")
                }
            } else if line.hasPrefix("/") {
                complain("\(line): no command; there are /image PATH and /quit")
            } else if !line.isEmpty {
                let answer = session.send(line, pictures: pictures)
                pictures = []
                try await interrupt.during(Task { try await show(answer) })
            }
        } catch {
            complain("gemma3-chat: \(error.localizedDescription)")  // the conversation goes on without this turn
        }
    }
    try await engine.close()
}

guard CommandLine.arguments.count == 2 else {
    complain("usage: gemma3-chat MODEL")
    exit(2)
}
do {
    try await chat(CommandLine.arguments[1])
} catch {
    complain("gemma3-chat: \(error.localizedDescription)")
    exit(1)
}
