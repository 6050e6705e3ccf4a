# ww completion for fish
function _ww_completion
    set -l before (string escape -- (commandline -opc))
    set -l words (string join \n -- $before (commandline -ct) | string collect)
    set -l response (env _WW_COMPLETE=complete_words COMP_WORDS=$words COMP_CWORD=(count $before) \
        ww 2>/dev/null | string match -r '.+')
    if test (count $response) -gt 0
        printf '%s\n' $response
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --command ww --no-files --arguments '(_ww_completion)'
